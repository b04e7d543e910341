"""Sending a version's model folder to the Hub, on request, once its digests were checked."""

from orchestrator.registry.manage import verify_files
from orchestrator.registry.model_card import CARD
from orchestrator.registry.read import ModelVersion
from trainers.errors import EvaluationError
from trainers.storage import TEMPORARY, Folder

LEFT_OUT = ["tuneyard.json", f"{TEMPORARY}*"]
"""What names paths of the machine that trained, and what a killed export left."""
NO_TOKEN = "the Hub wants a token: `hf auth login`, or set HF_TOKEN"


def push(version: ModelVersion, repository: str, private: bool) -> str:
    """Upload the folder as one commit, with the token of `hf auth login` or HF_TOKEN. Returns the commit's address.

    Raises:
        EvaluationError: where a file is not as it was registered, there is no token, or the Hub refuses.
    """
    from huggingface_hub import HfApi, ModelCard, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    bad = [f"{one.file} {one.state}" for one in verify_files(version) if one.state != "ok"]
    folder = Folder(version.source)
    if bad or not folder.is_local:
        why = ", ".join(bad) or "it lies in a bucket, and only folders are sent"
        raise EvaluationError(f"{version.model} version {version.version} is not sent: {why}")
    if get_token() is None:
        raise EvaluationError(f"{version.model} version {version.version} is not sent: {NO_TOKEN}")
    if folder.exists(CARD):
        ModelCard.load(folder.path / CARD)  # as the Hub's parser reads it
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        message = f"{version.model} version {version.version}: {version.metric} {version.metrics.get(version.metric)}"
        done = api.upload_folder(
            repo_id=repository, folder_path=folder.path, commit_message=message, ignore_patterns=LEFT_OUT
        )
    except Exception as error:  # its client's errors change with its HTTP library
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        said = isinstance(error, HfHubHTTPError | HFValidationError)
        raise EvaluationError(f"the Hub {'refused' if said else 'did not answer for'} {repository}: {cause}") from error
    return str(done.commit_url)
