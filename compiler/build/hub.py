"""Publishing to the Hugging Face Hub: the files of an artifact in one commit, with a model card as README.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.common.errors import MoecError, OutputError, UsageError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KEPT = frozenset({".gitattributes"})
"""Files of a repository that belong to the Hub."""


def push(
    files: Mapping[str, Path], card: str, name: str, *, tag: str | None, endpoint: str | None, public: bool
) -> dict[str, str]:
    """Make a repository equal to an artifact, in one commit. A repository that does not exist is created.

    Args:
        files: Name in the repository -> file; README.md is left out.
        card: The text of README.md.
        name: The repository, OWNER/NAME.
        tag: Tag of the commit; None for no tag.
        endpoint: Address of the Hub; None: that of huggingface_hub.
        public: Whether a new repository is public.

    Returns:
        `version` (the tag, or the commit) and `location` (the address of the commit).

    Raises:
        UsageError: The name is not that of a repository.
        OutputError: The Hub refuses, or the tag exists already.
    """
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint, library_name="moec")
    with _said(api, name):
        api.create_repo(name, private=not public, exist_ok=True)
        if tag is not None and tag in {found.name for found in api.list_repo_refs(name).tags}:
            raise OutputError(f"{name}: version {tag} exists already", hint="give another --as, or omit it")
        wanted: dict[str, Path | bytes] = {**files, "README.md": card.encode()}
        stale = set(api.list_repo_files(name)) - wanted.keys() - KEPT
        done = api.create_commit(
            name,
            [
                *(CommitOperationAdd(place, content) for place, content in wanted.items()),
                *(CommitOperationDelete(place) for place in sorted(stale)),
            ],
            commit_message=f"moec publish{f' {tag}' if tag else ''}",
        )
        assert isinstance(done, CommitInfo)
        if tag is not None:
            api.create_tag(name, tag=tag, revision=done.oid)
    return {"version": tag or done.oid, "location": done.commit_url}


@contextmanager
def _said(api: HfApi, name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors of moec.

    Raises:
        UsageError: The name is not that of a repository.
        OutputError: Anything else.
    """
    # HTTPError is that of httpx in release 1, of httpx2 in release 2.
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except MoecError:
        raise
    except HFValidationError as error:
        raise UsageError(f"--name: {first_line(error)}", hint="give the repository as OWNER/NAME") from error
    except (HTTPError, OSError, ValueError) as error:  # a ValueError: the answer is not JSON
        raise OutputError(
            f"{api.endpoint}: {name}: {first_line(error)}",
            hint="`hf auth login`, or set HF_TOKEN to a token that may write to this repository",
        ) from error
