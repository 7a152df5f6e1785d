"""The sources that readers stand in for, by `digest`, of every version that was read.

Written by tests/support/known_code.py.
"""

KNOWN: dict[str, tuple[str, ...]] = {
    "PyTorch.Classification.ConvNets.image_classification.models.common:Flatten.forward": (
        "a9933d8987b8e381",
    ),
    "PyTorch.Classification.ConvNets.image_classification.models.common:ONNXSiLU.forward": (
        "8d5fccf502a1959f",
    ),
    "PyTorch.Classification.ConvNets.image_classification.models.common:SequentialSqueezeAndExcitation._attention": (
        "d649e18da51a8ab4",
    ),
    "PyTorch.Classification.ConvNets.image_classification.models.common:SequentialSqueezeAndExcitation.forward": (
        "a3b6b2c8076d7251",
    ),
    "PyTorch.Classification.ConvNets.image_classification.models.common:SequentialSqueezeAndExcitationTRT._attention": (
        "c45fe628f31afb47",
    ),
    "PyTorch.Classification.ConvNets.image_classification.models.common:SequentialSqueezeAndExcitationTRT.forward": (
        "a3b6b2c8076d7251",
    ),
    "PyTorch.Classification.ConvNets.image_classification.models.common:StochasticDepthResidual.forward": (
        "368ae0a462a4759e",
    ),
    "PyTorch.Classification.ConvNets.image_classification.models.efficientnet:EfficientNet.forward": (
        "c8268b310f7b4df0",
    ),
    "PyTorch.Classification.ConvNets.image_classification.models.efficientnet:MBConvBlock.forward": (
        "5c0a88f1f3b45363",
    ),
    "efficientnet_lite_pytorch.model:EfficientNet.extract_features": ("8b019c87134cab02",),
    "efficientnet_lite_pytorch.model:EfficientNet.forward": ("cde57963f457c9b0",),
    "efficientnet_lite_pytorch.model:MBConvBlock.forward": ("2b38e8071165f68d",),
    "efficientnet_lite_pytorch.utils:Conv2dDynamicSamePadding.forward": ("59cb9942bdf5347a",),
    "efficientnet_lite_pytorch.utils:Conv2dStaticSamePadding.forward": ("eb5bb1719b5dd288",),
    "efficientnet_lite_pytorch.utils:Identity.forward": ("6093696562fbf9ce",),
    "efficientnet_lite_pytorch.utils:MemoryEfficientSwish.forward": ("85d15b93073eed6d",),
    "efficientnet_lite_pytorch.utils:Swish.forward": ("8d5fccf502a1959f",),
    "efficientnet_lite_pytorch.utils:SwishImplementation.backward": ("46d7d5bccac6dffc",),
    "efficientnet_lite_pytorch.utils:SwishImplementation.forward": ("4dcac71b444ba2e3",),
    "efficientnet_lite_pytorch.utils:drop_connect": ("40c95173b5fc35d7",),
    "efficientnet_pytorch.model:EfficientNet.extract_features": ("8b019c87134cab02",),
    "efficientnet_pytorch.model:EfficientNet.forward": ("22a81479000eb6d6",),
    "efficientnet_pytorch.model:MBConvBlock.forward": ("2b38e8071165f68d",),
    "efficientnet_pytorch.utils:Conv2dDynamicSamePadding.forward": ("59cb9942bdf5347a",),
    "efficientnet_pytorch.utils:Conv2dStaticSamePadding.forward": ("eb5bb1719b5dd288",),
    "efficientnet_pytorch.utils:MemoryEfficientSwish.forward": ("85d15b93073eed6d",),
    "efficientnet_pytorch.utils:SwishImplementation.backward": ("8148e3a19b931b83",),
    "efficientnet_pytorch.utils:SwishImplementation.forward": ("4dcac71b444ba2e3",),
    "efficientnet_pytorch.utils:drop_connect": ("d78e1fb550c96fca",),
    "image_classification.models.common:Flatten.forward": ("a9933d8987b8e381",),
    "image_classification.models.common:ONNXSiLU.forward": ("8d5fccf502a1959f",),
    "image_classification.models.common:SequentialSqueezeAndExcitation._attention": (
        "d649e18da51a8ab4",
    ),
    "image_classification.models.common:SequentialSqueezeAndExcitation.forward": (
        "a3b6b2c8076d7251",
    ),
    "image_classification.models.common:SequentialSqueezeAndExcitationTRT._attention": (
        "c45fe628f31afb47",
    ),
    "image_classification.models.common:SequentialSqueezeAndExcitationTRT.forward": (
        "a3b6b2c8076d7251",
    ),
    "image_classification.models.common:StochasticDepthResidual.forward": ("368ae0a462a4759e",),
    "image_classification.models.efficientnet:EfficientNet.forward": ("c8268b310f7b4df0",),
    "image_classification.models.efficientnet:MBConvBlock.forward": ("5c0a88f1f3b45363",),
    "monai.networks.blocks.activation:MemoryEfficientSwish.forward": ("a2f882b44ba1cc25",),
    "monai.networks.blocks.activation:Swish.forward": ("1466d02e8373c6f0",),
    "monai.networks.blocks.activation:monai_swish": ("48d80db411914ce7",),
    "monai.networks.nets.efficientnet:EfficientNetBN.forward": ("25f5834944b5922f",),
    "monai.networks.nets.efficientnet:EfficientNetBNFeatures.forward": ("4cdbbe90fa7fbdd0",),
    "monai.networks.nets.efficientnet:EfficientNetEncoder.forward": ("4cdbbe90fa7fbdd0",),
    "monai.networks.nets.efficientnet:MBConvBlock.forward": ("0413ff9a01da13a3",),
    "monai.networks.nets.efficientnet:drop_connect": ("2344900775eb6036",),
    "segmentation_models_pytorch.encoders._efficientnet:Conv2dDynamicSamePadding.forward": (
        "59cb9942bdf5347a",
    ),
    "segmentation_models_pytorch.encoders._efficientnet:Conv2dStaticSamePadding.forward": (
        "eb5bb1719b5dd288",
    ),
    "segmentation_models_pytorch.encoders._efficientnet:MBConvBlock.forward": ("f92edf6a47aa7bf8",),
    "segmentation_models_pytorch.encoders._efficientnet:drop_connect": ("d78e1fb550c96fca",),
    "segmentation_models_pytorch.encoders.efficientnet:EfficientNetEncoder.forward": (
        "7e92aa19b9fb3a69",
    ),
    "segmentation_models_pytorch.encoders.timm_efficientnet:EfficientNetEncoder.forward": (
        "17e610531142abba",
    ),
    "segmentation_models_pytorch.encoders.timm_efficientnet:EfficientNetLiteEncoder.forward": (
        "17e610531142abba",
    ),
    "timm.layers.activations:Sigmoid.forward": ("a29b7b648002a763",),
    "timm.layers.activations:Swish.forward": ("bb95f87c4ed54cae",),
    "timm.layers.activations:swish": ("4d37c1215944c7fa",),
    "timm.layers.adaptive_avgmax_pool:SelectAdaptivePool2d.forward": ("04a63dc36d4bd1ea",),
    "timm.layers.config:use_reentrant_ckpt": ("303b0a4b1354dfdf",),
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
    "timm.models._manipulate:checkpoint": ("af03fe60d7efbf6e",),
    "timm.models._manipulate:checkpoint_seq": ("da913392a4727cbb",),
    "timm.models.efficientnet:EfficientNet.forward": ("a3904e8d6b56ad1f",),
    "timm.models.efficientnet:EfficientNet.forward_features": ("7ce6fab10f92f292",),
    "timm.models.efficientnet:EfficientNet.forward_head": ("becd570e1b3ea946",),
    "timm.models.efficientnet:EfficientNetFeatures.forward": ("e771ac1199c0e6be",),
    "timm.models.mobilenetv3:MobileNetV3.forward": ("a3904e8d6b56ad1f",),
    "timm.models.mobilenetv3:MobileNetV3.forward_features": ("f2978ae2f0506d22",),
    "timm.models.mobilenetv3:MobileNetV3.forward_head": (
        "36b87069936fc815",
        "1188901a3522d59a",
    ),
    "torchvision.models.efficientnet:EfficientNet._forward_impl": ("02312ee03fdbbaf0",),
    "torchvision.models.efficientnet:EfficientNet.forward": ("113cb748f4babbfe",),
    "torchvision.models.efficientnet:FusedMBConv.forward": ("a84a40040fc5e7ae",),
    "torchvision.models.efficientnet:MBConv.forward": ("a84a40040fc5e7ae",),
    "torchvision.ops.misc:FrozenBatchNorm2d.forward": ("7a5d6032265ee1b8",),
    "torchvision.ops.misc:SqueezeExcitation._scale": ("716f01a37a025e7d",),
    "torchvision.ops.misc:SqueezeExcitation.forward": ("de49024413e09ecf",),
    "torchvision.ops.stochastic_depth:StochasticDepth.forward": ("81a7681d0a722a32",),
    "torchvision.ops.stochastic_depth:stochastic_depth": ("6eacb735ab33a9b4",),
    "torchvision.utils:_log_api_usage_once": ("5c1ee71515af4aaa",),
    "transformers.activations:SiLUActivation.forward": ("88934a026a3bf9a2",),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetBlock.forward": (
        "6bbdb79362c9b928",
    ),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetDepthwiseLayer.forward": (
        "5c17ccf5b680c7c0",
    ),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetEmbeddings.forward": (
        "b987581354e8a64b",
    ),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetEncoder.forward": (
        "c5c5b62dbf7e94c9",
    ),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetExpansionLayer.forward": (
        "2df05d71563d3e78",
    ),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetFinalBlockLayer.forward": (
        "de25d513cfc482ea",
    ),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetForImageClassification.forward": (
        "81e3233e5bfd257f",
    ),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetModel.forward": (
        "9d7aabe8c2bd65e0",
    ),
    "transformers.models.efficientnet.modeling_efficientnet:EfficientNetSqueezeExciteLayer.forward": (
        "fa6c3b0f522087e4",
    ),
}
