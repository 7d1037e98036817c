"""What a model of this library is on the Hub, beyond what transformers does for every model."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from memlm.errors import UserError
from memlm.models.card import card_config, write_card
from memlm.models.downloads import check_downloads
from memlm.models.offloading import place_memories
from memlm.models.quantization import refuse_quantized_memories
from memlm.models.run_facts import find_run, weights_fingerprint
from memlm.models.upload import push_folder


class PushWithCard:
    """Goes to the Hub with a model card: a model, or a memory for a pretrained one."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
        license: str | None = None,
    ) -> str:
        """Upload weights, config and a model card in one commit.

        A card that a user wrote on the Hub stays as it is.

        Args:
            repo_id: owner/name; the repository is made where there is none.
            license: of the weights, as the Hub spells it (apache-2.0, ...).
            commit_message: and the other arguments as in transformers.

        Returns:
            The address of the commit.

        Raises:
            UserError: when the Hub cannot be reached, knows no token, or refuses.
        """

        def write(folder: Path) -> None:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            config = card_config(folder)
            if config is not None:
                source = _source(self, folder)
                write_card(folder, config, source, repo_id, license, tags)

        return push_folder(
            repo_id,
            write,
            message=commit_message or "Upload model",
            description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


class HubModel(PushWithCard, PreTrainedModel):
    """Checks what it loads, and has a model card."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers.

        Raises:
            UserError: for damaged files, or when memories would be quantized, or what they share
                would be offloaded.
            OSError: of transformers, where there is no such model.
        """
        source = str(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            config = kwargs.get("config")
            if not isinstance(config, cls.config_class):
                names = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
                options = {name: kwargs[name] for name in names if name in kwargs}
                config = cls.config_class.from_pretrained(config or source, **options)
            refuse_quantized_memories(cls, config, kwargs["quantization_config"])
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            check_downloads(source, kwargs)  # what was fetched explains what went wrong
            if isinstance(error, SafetensorError):
                raise UserError(
                    f"{source}: the weights are damaged (no safetensors file: {error})"
                ) from error
            if isinstance(error.__cause__ or error, HFValidationError):
                raise UserError(
                    f"there is no folder {source!r}, and no such id on the Hub"
                ) from error
            raise
        check_downloads(source, kwargs)
        place_memories(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing: save_pretrained writes what AutoModel needs, and copies no source files."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; a model of a run folder gets its model card beside it."""
        folder = Path(save_directory)
        repository = kwargs.pop("repo_id", folder.name)
        names = ("commit_message", "private", "token", "revision", "create_pr")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(folder, is_main_process, state_dict, **kwargs)
        # Training itself saves inside a run folder.
        if is_main_process and find_run(folder) is None:
            source = _source(self, folder)
            if source is not None:
                write_card(folder, self.config, source)
        if push_to_hub and is_main_process:
            if "max_shard_size" in kwargs:
                options["max_shard_size"] = kwargs["max_shard_size"]
            self.push_to_hub(repository, **options)


def _source(model: PreTrainedModel, saved: Path) -> Path | None:
    """Where a saved model was loaded from: a folder of a run that holds the same weights."""
    source = Path(model.name_or_path)
    if not model.name_or_path or find_run(source) is None:
        return None
    weights = weights_fingerprint(saved)
    return source if weights is not None and weights == weights_fingerprint(source) else None
