"""Where a checkpoint is: a directory, the bundled model, or an id on the Hugging Face hub.

A hub id is downloaded once into the hub's own cache, with progress, weights and texts only: no
code of a repository is ever fetched or run.
"""

import re
from pathlib import Path

from aprium.base.errors import CheckpointError
from aprium.model.presets import PRESETS

# The bundled model's files, part of the installed package.
PICO_DIR = Path(__file__).parents[1] / "pico_checkpoint"
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def resolve(source: str | Path) -> Path:
    """Return the directory of the checkpoint that `source` names, downloading it if need be.

    A directory comes before the bundled "pico", and that before a hub id ("owner/name"). Raises
    CheckpointError saying what `source` could have been.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if name == "pico":
        if (PICO_DIR / "config.json").exists():
            return PICO_DIR
        raise CheckpointError(f"the bundled model is not in this installation ({PICO_DIR})")
    if name in PRESETS:
        raise CheckpointError(
            f"{name!r} is a preset without weights: give a directory or a hub id, or use "
            "load_format='dummy' for random weights"
        )
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the directory that holds config.json")
    if HUB_ID.match(name):
        return download(name)
    raise CheckpointError(
        f"no checkpoint {name!r}: it is neither a directory, nor 'pico', nor a hub id (owner/name)"
    )


def download(repo_id: str) -> Path:
    """Fetch a repository's weights, configuration and tokenizer files; return its directory.

    Raises CheckpointError in one sentence when the hub cannot be reached or refuses.
    """
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise CheckpointError(f"the hub asks for a login to download {repo_id!r}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"no repository {repo_id!r} on the hub, and no directory") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise CheckpointError(
            f"cannot download {repo_id!r}: there is no such directory here, and the hub cannot be "
            f"reached ({type(error).__name__}); go online or give a directory"
        ) from error
