"""The sources that readers stand in for, by `digest`, of every version that was read.

Written by tests/support/known_code.py.
"""

KNOWN: dict[str, tuple[str, ...]] = {
    "timm.layers.activations:Sigmoid.forward": ("a29b7b648002a763",),
    "timm.layers.activations:Swish.forward": ("bb95f87c4ed54cae",),
    "timm.layers.activations:swish": ("4d37c1215944c7fa",),
    "timm.layers.conv2d_same:Conv2dSame.forward": ("f59bae9ae8b17bc2",),
    "timm.layers.conv2d_same:conv2d_same": ("618598410d82f402",),
    "timm.layers.drop:DropPath.forward": ("cc40277fd0c288ae",),
    "timm.layers.drop:drop_path": ("49ead7a6b7c3d1e6",),
    "timm.layers.norm_act:BatchNormAct2d.forward": ("b5085a188647475c",),
    "timm.layers.padding:get_same_padding": ("ec3643e7011edc58",),
    "timm.layers.padding:pad_same": ("dd55dfed9b69d53f",),
    "timm.models._efficientnet_blocks:ConvBnAct.forward": (
        "ef9eae4f84137024",
        "9b6332a91e206d97",
    ),
    "timm.models._efficientnet_blocks:DepthwiseSeparableConv.forward": (
        "0c4688eff1847489",
        "ad448e71a9b637d2",
    ),
    "timm.models._efficientnet_blocks:EdgeResidual.forward": (
        "aeb8a821b06a2603",
        "413de692594acf37",
    ),
    "timm.models._efficientnet_blocks:InvertedResidual.forward": (
        "f965cfa4e8aae3d9",
        "a5f04e76eb921d06",
    ),
    "timm.models._efficientnet_blocks:SqueezeExcite.forward": ("cc76871bc91e1f76",),
    "torchvision.models.efficientnet:FusedMBConv.forward": ("a84a40040fc5e7ae",),
    "torchvision.models.efficientnet:MBConv.forward": ("a84a40040fc5e7ae",),
    "torchvision.ops.misc:SqueezeExcitation._scale": ("716f01a37a025e7d",),
    "torchvision.ops.misc:SqueezeExcitation.forward": ("de49024413e09ecf",),
    "torchvision.ops.stochastic_depth:StochasticDepth.forward": ("81a7681d0a722a32",),
    "torchvision.ops.stochastic_depth:stochastic_depth": ("6eacb735ab33a9b4",),
    "torchvision.utils:_log_api_usage_once": ("5c1ee71515af4aaa",),
}
