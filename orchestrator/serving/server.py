"""One address whose model can be exchanged: requests in flight end with the model that they began with.

Begin at `serve`. What a model answers stands in `apps.py`.
"""

import logging
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.serving.apps import ServedModel, build_app, close_app
from trainers.errors import PlacementError

Scope = MutableMapping[str, Any]
Handler = Callable[[Scope, Any, Any], Awaitable[None]]

WATCH_S = 5.0
"""Between two looks at who is champion."""


@dataclass
class Stage:
    """The model that answers, and how many requests it is at."""

    model: ServedModel
    app: Any
    in_flight: int = 0
    idle: threading.Event = field(default_factory=threading.Event)


class Switch:
    """An ASGI application that hands each request to the present model."""

    def __init__(self, model: ServedModel) -> None:
        self._stage = Stage(model, build_app(model))

    @property
    def model(self) -> ServedModel:
        """The present one."""
        return self._stage.model

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """One request, or the server's start and end."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        stage = self._stage
        stage.in_flight += 1  # on the loop's thread alone
        try:
            await stage.app(scope, receive, send)
        finally:
            stage.in_flight -= 1
            if stage is not self._stage and not stage.in_flight:
                stage.idle.set()

    def exchange(self, model: ServedModel, call_on_loop: Callable[..., Any]) -> None:
        """Load another model, give it all new requests, and let go of the old one when it is done.

        Args:
            call_on_loop: as the loop's call_soon_threadsafe.
        """
        new, old = Stage(model, build_app(model)), self._stage

        def swap() -> None:
            self._stage = new
            if not old.in_flight:
                old.idle.set()

        call_on_loop(swap)
        old.idle.wait()
        close_app(old.app)


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def bind(host: str, port: int) -> socket.socket:
    """Take an address, on which nobody is heard before the model is there. Raises PlacementError where it is taken."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise PlacementError(f"cannot listen at {host}:{port} ({error.strerror}): name another --port") from error
    return bound


def serve(
    model: ServedModel,
    bound: socket.socket,
    newer: Callable[[ServedModel], ServedModel | None],
    say: Callable[[str], None],
    ready: Callable[[], None],
    watch_s: float = WATCH_S,
) -> None:
    """Answer until Ctrl-C or SIGTERM.

    Args:
        bound: as `bind` gives it.
        newer: another model that should answer from now on, checked, or None; asked in a thread, may raise.
        say: takes a line for the terminal.
        ready: called once the model is loaded.
    """
    import asyncio

    import uvicorn

    switch = Switch(model)
    ready()
    server = uvicorn.Server(uvicorn.Config(switch, log_level="warning"))
    over = threading.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def watch() -> None:
            while not over.wait(watch_s):
                try:
                    found = newer(switch.model)
                    if found:
                        switch.exchange(found, loop.call_soon_threadsafe)
                        say(f"{found.name} answers now")
                except Exception as error:  # the model that answers goes on
                    logging.getLogger(__name__).exception("looking for another model")
                    say(f"{switch.model.name} stays: {error}")

        threading.Thread(target=watch, daemon=True, name="champion").start()
        await server.serve(sockets=[bound])

    try:
        asyncio.run(run())
    finally:
        over.set()
