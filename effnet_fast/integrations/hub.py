"""Networks in folders in the layout of the Hugging Face Hub: config.json and model.safetensors.

Source: names and arguments as in PyTorchModelHubMixin, https://github.com/huggingface/huggingface_hub,
which is imported where the Hub itself is asked.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from effnet_fast import checkpoints, files
from effnet_fast.checkpoints.facts import FACTS_ENTRY

# Modules of networks are imported where they are used: theirs imports this one.
if TYPE_CHECKING:
    from typing_extensions import Self

    from effnet_fast.integrations.hub_config import NetworkConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
IN_PLACE = re.compile(r",? ?inplace=(True|False)")  # changes no result where the network has it
OWN_OPTIONS = ("backend", "memory")  # how to run a network, whatever it is


class HubMethods(nn.Module):
    """Base of `EfficientNet`: to save a network to a folder or the Hub, and to load one."""

    if TYPE_CHECKING:
        class_names: tuple[str, ...]

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, class_names: Sequence[str] | None = None
    ) -> None:
        """Writes model.safetensors and config.json, from which `from_pretrained` rebuilds it.

        Args:
            folder: is made where there is none.
            class_names: names of the classes; None means `self.class_names`.

        Raises:
            ValueError: the network is not what its own arguments build (another layer was put in,
                another normalisation, layers were removed): the first difference is named.
                Names that are not one for each class.
            OSError: the folder cannot be written.
        """
        from effnet_fast.integrations import hub_config

        config = _config_of(self, class_names)
        state = self.state_dict()
        _check_rebuilt(self, config)
        os.makedirs(folder, exist_ok=True)
        checkpoints.save(state, Path(folder, WEIGHTS))
        with files.replacing(Path(folder, CONFIG)) as temporary:
            temporary.write_text(hub_config.write(config), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        class_names: Sequence[str] | None = None,
        commit_message: str = "Push model using effnet_fast",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes, to a repository that is made where there is none.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed.
            ValueError, OSError: as `save_pretrained`, and what huggingface_hub raises.
        """
        api = _huggingface_hub().HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, class_names=class_names)
            repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        return str(commit)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """The network of a folder of `save_pretrained` or of a repository, in evaluation mode.

        Nothing from a file is executed. Weights have the dtypes that they were saved in.

        Args:
            folder_or_repo: a folder, else the Hub's "owner/name".
            revision, cache_dir, token, force_download, local_files_only: as in
                `huggingface_hub.hf_hub_download`; a folder does without.
            options: `backend` and `memory`, as for `EfficientNet`; memory is as saved unless given.

        Raises:
            ImportError: a repository, and huggingface_hub is not installed.
            OSError: the folder or one of the two files is not there or cannot be read; what
                huggingface_hub raises.
            ValueError: config.json or the weights are not those of a network of this class; the
                message names the file.
            TypeError: another option.
        """
        if unknown := options.keys() - set(OWN_OPTIONS):
            raise TypeError(
                f"from_pretrained takes {' and '.join(OWN_OPTIONS)} as options, got "
                f"{', '.join(sorted(unknown))}: config.json has the rest"
            )
        given = os.fspath(folder_or_repo)
        if os.path.isdir(given):
            config_file, weights_file = (os.path.join(given, name) for name in (CONFIG, WEIGHTS))
        elif not _names_a_repository(given):
            raise FileNotFoundError(f"{given}: neither a folder nor the Hub's owner/name")
        else:
            download = _huggingface_hub().hf_hub_download
            config_file, weights_file = (
                download(
                    given,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
                for name in (CONFIG, WEIGHTS)
            )
        return _load(cls, config_file, weights_file, options)


def _load(cls: Any, config_file: str, weights_file: str, options: dict[str, Any]) -> Any:
    from effnet_fast.integrations import hub_config
    from effnet_fast.models.loading import build_from_state

    text = files.read_text(config_file)
    with files.naming_file(config_file):
        config = hub_config.read(text)
    state = checkpoints.load(weights_file, "torchvision")
    with files.naming_file(config_file):
        # Every block has weights: a table of more blocks would be built in vain.
        if config.variant.blocks > len(state):
            raise ValueError(f"a network of {config.variant.blocks} blocks has more weights")
    with files.naming_file(weights_file):
        model = build_from_state(
            lambda: cls(config.variant, **{**config.options, **options}), state
        )
    model._origin = frozenset(config.origin.items())
    model.class_names = config.class_names
    return model.eval()


def _config_of(model: Any, class_names: Sequence[str] | None) -> NetworkConfig:
    """The arguments of a network, as it is now."""
    from effnet_fast.integrations import hub_config

    classifier = model.get_classifier()
    num_classes = classifier.out_features if isinstance(classifier, nn.Linear) else 0
    dropouts = [m.p for m in model.classifier.modules() if isinstance(m, nn.Dropout)]
    options = {
        "num_classes": num_classes,
        "in_chans": model.in_chans,
        "global_pool": model.global_pool,
        "dropout": dropouts[0] if dropouts else 0.0,
        "stochastic_depth_prob": model.stochastic_depth_prob,
        "memory": model.memory,
    }
    names: Any = model.class_names if class_names is None else class_names
    if class_names is not None or names:
        names = hub_config.check_class_names(names, num_classes)
    origin = {name: entry for name, entry in model._origin if name != FACTS_ENTRY}
    return hub_config.NetworkConfig(model.variant, options, origin, tuple(names))


def _check_rebuilt(model: Any, config: NetworkConfig) -> None:
    """Compares a network with what `from_pretrained` would build, setting by setting."""
    from effnet_fast.integrations import hub_config
    from effnet_fast.models.loading import unfilled

    # The text is what is read back: numbers of other types, say, end here.
    read = hub_config.read(hub_config.write(config))
    with unfilled():
        rebuilt = type(model)(read.variant, **read.options)
    own, other = (IN_PLACE.sub("", repr(x)).splitlines() for x in (model, rebuilt))
    if own != other:
        pairs = zip([*own, "the end"], [*other, "the end"], strict=False)
        first, second = next((a.strip(), b.strip()) for a, b in pairs if a != b)
        raise ValueError(
            f"config.json cannot describe this network: it has {first!r} where its arguments build "
            f"{second!r}. Save its state dict by effnet_fast.checkpoints.save"
        )
    checkpoints.check(rebuilt, model.state_dict())


def _names_a_repository(text: str) -> bool:
    owner, _, name = text.partition("/")
    return owner not in ("", ".", "..", "~") and bool(name) and not set(name) & set("/\\")


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "huggingface_hub is needed for the Hugging Face Hub: "
            'pip install "effnet-fast[hub]" (or huggingface_hub); folders do without'
        ) from error
    return huggingface_hub
