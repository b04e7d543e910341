"""Sending a version's model folder to the Hub, on request, once its digests were checked."""

from orchestrator.registry.manage import verify_files
from orchestrator.registry.model_card import CARD
from orchestrator.registry.read import ModelVersion
from trainers.errors import EvaluationError
from trainers.storage import Folder

LEFT_OUT = ["tuneyard.json"]
"""Names paths of the machine that trained."""


def push(version: ModelVersion, repository: str, private: bool) -> str:
    """Upload the folder as one commit, with the token of `hf auth login` or HF_TOKEN. Returns the commit's address.

    Raises:
        EvaluationError: where a file is not as it was registered, or the Hub refuses.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    bad = [f"{one.file} {one.state}" for one in verify_files(version) if one.state != "ok"]
    folder = Folder(version.source)
    if bad or not folder.is_local:
        why = ", ".join(bad) or "it lies in a bucket, and only folders are sent"
        raise EvaluationError(f"{version.model} version {version.version} is not sent: {why}")
    if folder.exists(CARD):
        ModelCard.load(folder.path / CARD)  # as the Hub's parser reads it
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        message = f"{version.model} version {version.version}: {version.metric} {version.metrics.get(version.metric)}"
        done = api.upload_folder(
            repo_id=repository, folder_path=folder.path, commit_message=message, ignore_patterns=LEFT_OUT
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, ConnectionError, OSError) as error:
        raise EvaluationError(f"the Hub refused {repository}: {str(error).splitlines()[0]}") from error
    return str(done.commit_url)
