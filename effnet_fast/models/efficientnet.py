"""EfficientNet, the classifier, and EfficientNetFeatures, the encoder of its feature maps.

Source: Tan & Le (arXiv 1905.11946); module tree, initialisation and draws as torchvision
0.28, more methods as timm's models/efficientnet.py, https://github.com/huggingface/pytorch-image-models.
"""

# Annotations are not postponed: torch.fx writes those of forward into the code that it pickles.

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from effnet_fast.inference.parts import FeaturesParts, Head, require_sequence
from effnet_fast.integrations.hub import HubMethods
from effnet_fast.models.backbone import (
    Backbone,
    check_count,
    check_probability,
    find_variant,
    init_parameters,
)
from effnet_fast.models.execution import backend_of, on_backend
from effnet_fast.models.feature_info import FeatureInfo, OutIndices, describe, ends_of
from effnet_fast.models.heads import POOLS, check_head, make_classifier
from effnet_fast.models.intermediates import Intermediates
from effnet_fast.models.loading import load_network
from effnet_fast.models.pooled_head import run_pooled_head
from effnet_fast.models.variants import Variant
from effnet_fast.modules import in_turn
from effnet_fast.modules.structure import RefusedError

if TYPE_CHECKING:
    from typing_extensions import Self


class EfficientNet(Intermediates, HubMethods):
    """EfficientNet, x [N,in_chans,H,W] -> logits [N,num_classes].

    Children: `features` (stem, the stages of blocks, head), `avgpool`, `classifier`.
    Activations are channels_last inside; what a user sees has the layout of stock PyTorch.

    Args:
        variant: row of `VARIANTS`, or its name.
        num_classes: size of the logits; 0 leaves the classifier out, and the network returns
            pooled features [N,head_hidden_size].
        dropout: drop probability before the classifier; None means the variant's.
        stochastic_depth_prob: p of the drop-path, growing linearly from 0 at the first block
            towards p after the last.
        norm_layer: makes a normalisation from its channels; None means BatchNorm2d with the
            variant's constants.
        in_chans: channels of the input images.
        global_pool: "avg", "max", "avgmax" (half their sum), "catavgmax" (one after the other), or
            "" for none, which returns maps and needs num_classes=0.
        backend: the kernels of the fused ops, as in `use_backend`; "auto" leaves the choice to
            the context, "reference" is stock PyTorch. `model.backend` changes it later.
        memory: "fast", or "lean" to save one expanded tensor less per block for backward and
            compute it again. `model.memory` changes it later, `block.memory` for a single
            block.

    Attributes:
        num_features: channels of the last feature map.
        head_hidden_size: inputs of the classifier, twice as many for "catavgmax".

    Raises:
        ValueError: an argument outside what is allowed.
        TypeError: a norm_layer that cannot be called.
    """

    def __init__(
        self,
        variant: Variant | str,
        *,
        num_classes: int = 1000,
        dropout: float | None = None,
        stochastic_depth_prob: float = 0.2,
        norm_layer: Callable[..., nn.Module] | None = None,
        in_chans: int = 3,
        global_pool: str = "avg",
        backend: str = "auto",
        memory: str = "fast",
    ) -> None:
        variant = find_variant(variant)
        dropout = variant.dropout if dropout is None else dropout
        check_count("num_classes", num_classes, least=0)
        check_probability("dropout", dropout)
        check_head(num_classes, global_pool)
        super().__init__(
            variant,
            stochastic_depth_prob=stochastic_depth_prob,
            norm_layer=norm_layer,
            in_chans=in_chans,
            backend=backend,
            memory=memory,
        )
        self.num_features = variant.head_channels
        self._set_head(num_classes, global_pool, dropout)
        for module in self.modules():
            init_parameters(module)

    def _set_head(self, num_classes: int, global_pool: str, dropout: float) -> None:
        make_pool, widening = POOLS[global_pool]
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head_hidden_size = widening * self.num_features
        self.avgpool = make_pool()
        # Dropout in place would overwrite maps that nothing has pooled.
        self.classifier = make_classifier(
            self.head_hidden_size, num_classes, dropout, in_place=bool(global_pool)
        )

    @classmethod
    def from_checkpoint(
        cls,
        path_or_url: str | os.PathLike[str],
        *,
        family: str = "auto",
        variant: Variant | str | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        ema: bool = True,
        progress: bool = True,
        **options: Any,
    ) -> "Self":
        """The network of a checkpoint of any family, with its weights, in training mode.

        Padding, BN constants and preprocessing (`model.variant`) are the family's, so that the
        logits equal those of the family's own package.

        Args:
            path_or_url: as for `checkpoints.load`. The model keeps no hold on the file.
            family: "torchvision", "timm", "timm_tf", "lukemelas", "nvidia", or "auto", by
                the file's metadata and names. timm's plain and `tf_` networks have the same names;
                the name of the file, or of the model in it, decides between them. Without such a
                name the network is assumed to be plain, with a warning.
            variant: a published size or a `Variant`; None finds the published size by the shapes.
            num_classes: 0 leaves the classifier out; None means as many as the file has.
            in_chans: channels of the images; a stem of another number is summed or repeated, see
                `adapt_input_channels`. None means as many as the file has.
            ema: whether to prefer the moving average of the weights in a training checkpoint.
            progress: shows a progress bar while downloading.
            options: as for `EfficientNet`.

        Raises:
            OSError, ValueError: as `checkpoints.load`, or the file's layers are not those of the
                variant; the first names and shapes that differ are given.
        """
        return load_network(
            cls,
            path_or_url,
            family=family,
            variant=variant,
            num_classes=num_classes,
            in_chans=in_chans,
            ema=ema,
            progress=progress,
            **options,
        )

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return self.forward_head(self.forward_features(x))
        backend = backend_of(self)
        y = self._own_plan.run(self, x, backend)
        y = run_pooled_head(self, x, backend) if y is None else y
        return self.forward_head(self.forward_features(x)) if y is None else y

    def inference_parts(self) -> FeaturesParts:
        """The modules that forward runs, for what runs them from packed weights."""
        classifier = self.classifier
        pool = self.avgpool, self.global_pool != ""
        head = Head(*pool, classifier, classifier, self._run_head)
        return FeaturesParts(self.features, head, ())

    def _run_head(self, x: Tensor) -> Tensor:
        """The result of the last stage's map."""
        with on_backend(self):
            x = self.features[-1](x)
        return self.forward_head(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map [N,num_features,H/32,W/32] of x [N,in_chans,H,W]."""
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return self._finished(self.features(self._prepared(x)), x)
        with on_backend(self):
            return self._finished(self.features(self._prepared(x)), x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and classifier.

        Args:
            x: the map of `forward_features`.
            pre_logits: stop before the last layer of the classifier, after dropout.

        Returns:
            [N,num_classes], or [N,head_hidden_size]; with global_pool="" the map itself.
        """
        x = self.avgpool(x)
        if self.global_pool != "":
            x = torch.flatten(x, 1)
        # As in forward_features; TorchScript can follow no list of modules.
        if not torch.jit.is_scripting() and pre_logits:
            return self._before_last(x)
        return self.classifier(x)

    def _before_last(self, x: Tensor) -> Tensor:
        if isinstance(self.classifier, nn.Sequential):
            for layer in list(self.classifier)[:-1]:
                x = layer(x)
        return x

    def get_classifier(self) -> nn.Module:
        """The layer that computes the logits, nn.Identity where num_classes is 0."""
        classifier = self.classifier
        return classifier[-1] if isinstance(classifier, nn.Sequential) else classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, randomly initialised classifier on the network's device, in its dtype and mode.

        Args:
            num_classes: size of the logits; 0 leaves the classifier out.
            global_pool: as in `EfficientNet`; None keeps the pooling.

        Raises:
            ValueError: an argument outside what is allowed.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        check_count("num_classes", num_classes, least=0)
        check_head(num_classes, global_pool)
        old = [m.p for m in self.classifier.modules() if isinstance(m, nn.Dropout)]
        like = next(self.features.parameters())
        with torch.device(like.device):
            self._set_head(num_classes, global_pool, old[0] if old else 0.0)
        init_parameters(self.classifier[1])
        self.classifier.to(like.dtype).train(self.training)
        self.avgpool.train(self.training)


class EfficientNetFeatures(Backbone):
    """EfficientNet as an encoder, x [N,in_chans,H,W] -> list of maps at strides 2, 4, 8, 16, 32.

    The child `features` has the same paths and parameters as in `EfficientNet`, without the layers
    after the last requested map. `load_state_dict` takes the whole network's state too, and ignores
    the entries of those layers and of the classifier.

    Args:
        out_indices: which of the five maps (your own `stages` may have fewer): places, counted
            from the end if negative, an int for the last n, or None for all. They are returned in
            the order of the network.
        endpoints: whose choice of the map at each stride. "timm": the last layer there. "smp":
            that of segmentation_models_pytorch's own encoders ("efficientnet-b0" and so on), the
            stem's map at stride 2, and in B0 that of the first block of stage 5 at stride 16;
            nothing may be hooked to that stage as a whole. "smp_timm": that of its encoders
            "timm-efficientnet-b0" and so on, which take the stem's map, too.
        variant, stochastic_depth_prob, norm_layer, in_chans, backend, memory: as in `EfficientNet`.

    Attributes:
        feature_info: their channels(), reduction() and module_name().

    Raises:
        IndexError: a map that does not exist.
        TypeError, ValueError: indices that are not ints, empty or repeated; other endpoints; other
            arguments as `EfficientNet`.
        RuntimeError: at a call, where a stage has a hook or another class, and a map is taken
            inside of it.
    """

    _taken: list[int]
    _split: int  # the stage in which a map is taken, -1 for none; its blocks count one by one
    _splits: Final[bool]

    def __init__(
        self,
        variant: Variant | str,
        *,
        out_indices: OutIndices | None = None,
        endpoints: str = "timm",
        stochastic_depth_prob: float = 0.2,
        norm_layer: Callable[..., nn.Module] | None = None,
        in_chans: int = 3,
        backend: str = "auto",
        memory: str = "fast",
    ) -> None:
        variant = find_variant(variant)
        info = FeatureInfo(describe(variant), out_indices, ends_of(variant, endpoints))
        super().__init__(
            variant,
            stochastic_depth_prob=stochastic_depth_prob,
            norm_layer=norm_layer,
            in_chans=in_chans,
            backend=backend,
            memory=memory,
            encodes=info,
        )
        self._taken, self._split = info.places(variant)
        self._splits = self._split >= 0
        for module in self.modules():
            init_parameters(module)

    @classmethod
    def from_checkpoint(
        cls,
        path_or_url: str | os.PathLike[str],
        *,
        family: str = "auto",
        variant: Variant | str | None = None,
        in_chans: int | None = None,
        ema: bool = True,
        progress: bool = True,
        **options: Any,
    ) -> "Self":
        """The encoder of a checkpoint's network, with its weights, in training mode.

        The file may be of the whole network or of an encoder with as many maps. Arguments and
        errors are those of `EfficientNet.from_checkpoint`; `options` those of this class.
        """
        return load_network(
            cls,
            path_or_url,
            family=family,
            variant=variant,
            in_chans=in_chans,
            ema=ema,
            progress=progress,
            classifies=False,
            **options,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return self._maps(x)
        maps = self._own_plan.run(self, x, backend_of(self))
        if maps is None:
            with on_backend(self):
                maps = self._maps(x)
        return maps

    def inference_parts(self) -> FeaturesParts:
        """The modules that forward runs, for what runs them from packed weights."""
        return FeaturesParts(self.features, None, tuple(self._taken), split=self._split)

    def _in_turn(self) -> list[nn.Module]:
        """The modules that are called in turn: stem and stages, of one of them the blocks."""
        modules = list(self.features)
        if self._split < 0:
            return modules
        stage: Any = modules[self._split]
        try:
            require_sequence(stage)
        except RefusedError as refused:
            raise RuntimeError(
                f"features.{self._split}{refused}, and a map is taken inside of it: "
                "change or hook its blocks instead"
            ) from None
        modules[self._split : self._split + 1] = stage
        return modules[: self._taken[-1] + 1]

    def _maps(self, x: Tensor) -> list[Tensor]:
        """The maps of images x, in the layout that stock gives them."""
        y = self._prepared(x)
        if not torch.jit.is_scripting():
            found = in_turn.run(self._in_turn(), y, self._taken)[1]
            stages = self.feature_info.get("stage")
            return [self._finished(m, x, i) for m, i in zip(found, stages, strict=True)]
        maps: list[Tensor] = []
        place = 0
        for index, stage in enumerate(self.features):
            # `_splits` is a constant: without it TorchScript leaves the branch out. TorchScript
            # also forbids the assertion by which mypy would know a stage for a sequence.
            if self._splits and index == self._split:
                for block in stage:  # type: ignore[attr-defined]
                    y = block(y)
                    if place in self._taken:
                        maps.append(self._finished(y, x, index))
                    place += 1
            else:
                y = stage(y)
                if place in self._taken:
                    maps.append(self._finished(y, x, index))
                place += 1
        return maps

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        stages = range(len(self.features), self._count_stages() + 2)
        names = ["classifier", *(f"features.{stage}" for stage in stages)]
        beyond = tuple(f"{prefix}{name}." for name in names if name not in self._modules)
        for key in [key for key in state_dict if key.startswith(beyond)]:
            del state_dict[key]  # of the copy that load_state_dict makes
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
