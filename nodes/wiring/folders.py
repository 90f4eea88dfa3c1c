"""The folders of the pack: reward models, guidance networks and collected samples.

Checks the names that users choose.
"""

import os
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

import folder_paths

from ...guidance.errors import GuidanceError, quoted, short
from ...guidance.network.file import save_network
from ...guidance.rewards.published import advice, published
from .loaded import LoadedNetwork

REWARDS = "reward_models"
NETWORKS = "guidance_networks"
COLLECTIONS = "guidance_data"
IMAGE_TOWERS, TEXT_TOWERS = "clip_vision", "text_encoders"
AUTO = "auto"
LONGEST_NAME = 200
"""Bytes of a file name or a folder name."""
ATTEMPTS = 100
"""How often saving looks for a free number, because another server may take one at the same moment."""


def register_folder(name: str = REWARDS) -> None:
    """Add models/NAME to ComfyUI's model folders. Keeps what extra_model_paths.yaml names."""
    paths, extensions = folder_paths.folder_names_and_paths.get(name, ([], set()))
    own = os.path.join(folder_paths.models_dir, name)
    folder_paths.folder_names_and_paths[name] = (
        list(dict.fromkeys([*paths, own])),
        extensions or folder_paths.supported_pt_extensions,
    )


def reward_names() -> list[str]:
    """All files in models/reward_models, and the image towers in models/clip_vision with that prefix."""
    return [
        *folder_paths.get_filename_list(REWARDS),
        *(f"{IMAGE_TOWERS}/{name}" for name in folder_paths.get_filename_list(IMAGE_TOWERS)),
    ]


def reward_path(name: str | None) -> str:
    """The path of a name from `reward_names`. Raises GuidanceError if there is no such file."""
    if not name:
        raise GuidanceError(
            f"No reward file is chosen: put one into {folder_paths.get_folder_paths(REWARDS)[0]}, press R, and choose "
            "it."
        )
    tower = name.removeprefix(f"{IMAGE_TOWERS}/")
    path = folder_paths.get_full_path(REWARDS, name) or (
        folder_paths.get_full_path(IMAGE_TOWERS, tower) if tower != name else None
    )
    if path is None:
        raise GuidanceError(missing_file(tower, IMAGE_TOWERS if tower != name else REWARDS))
    return path


def tower_path(kind: str, name: str) -> Path | None:
    """The path of a chosen tower, or None for `auto`. Raises GuidanceError if there is no such file."""
    if name == AUTO:
        return None
    if (path := folder_paths.get_full_path(kind, name)) is None:
        raise GuidanceError(missing_file(name, kind))
    return Path(path)


def model_folders(kind: str) -> tuple[Path, ...]:
    return tuple(map(Path, folder_paths.get_folder_paths(kind)))


def missing_file(name: str, kind: str) -> str:
    """The message for a file that is missing from the folders of this kind."""
    folder, found = folder_paths.get_folder_paths(kind)[0], folder_paths.get_filename_list(kind)
    if published(name):
        return f"{short(name)} is missing: {advice(short(name), folder)}; then press R."
    others = shorten(", ".join(found), 200, placeholder=" ...") or "nothing"
    return f"{short(name)} is not in {folder}, where there is {others}; choose another, or put it there."


def network_path(name: str | None) -> Path:
    """The path of a guidance network. Raises GuidanceError if there is no such file."""
    if (path := folder_paths.get_full_path(NETWORKS, name) if name else None) is None:
        folder = folder_paths.get_folder_paths(NETWORKS)[0]
        raise GuidanceError(
            f"There is no guidance network {quoted(name or '')} in {folder}: put it there, press R, and choose it."
        )
    return Path(path)


def save_numbered(prefix: str, network: LoadedNetwork) -> Path:
    """Save a network in models/guidance_networks under the first free number.

    Raises GuidanceError if the prefix is no file name, or if no number is free.
    """
    for _ in range(ATTEMPTS):
        with suppress(FileExistsError):
            save_network(path := free_path(prefix), network.network, network.card, new=True)
            return path
    raise GuidanceError(f"No number after {quoted(prefix)} is free: write another filename_prefix.")


def free_path(prefix: str) -> Path:
    """A path in models/guidance_networks that does not exist yet.

    Raises GuidanceError if the prefix is no file name.
    """
    root = Path(folder_paths.get_folder_paths(NETWORKS)[0])
    parts = Path(prefix).parts
    short_enough = parts and max(len(part.encode(errors="replace")) for part in parts) <= LONGEST_NAME
    if not short_enough or "\0" in prefix or not (root / prefix).resolve().is_relative_to(root.resolve()):
        raise GuidanceError(
            f"{quoted(prefix)} is not a name for a file in models/{NETWORKS}: "
            "write a short one without leading slashes and '..'."
        )
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    except OSError as error:
        raise GuidanceError(
            f"{quoted(prefix)} cannot be a file in models/{NETWORKS} ({short(error.strerror)}): write another name."
        ) from error
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def collections_root() -> Path:
    return Path(folder_paths.get_output_directory()) / COLLECTIONS


def collection_names() -> list[str]:
    """The folders in output/guidance_data that hold a collection."""
    return sorted(path.parent.name for path in collections_root().glob("*/collection.json"))


def collection_folder(name: str) -> Path:
    """output/guidance_data/NAME. Raises GuidanceError if NAME is no folder name."""
    name = name.strip()
    if not name or name != Path(name).name or name == ".." or "\0" in name or len(name.encode()) > LONGEST_NAME:
        raise GuidanceError(
            f"{quoted(name)} is not a name for a folder in output/{COLLECTIONS}: write a short one without slashes."
        )
    return collections_root() / name
