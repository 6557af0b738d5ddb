"""Model constructors, one file per family; published weights, feature maps, surgery, deployment and export."""

from holofunc.models import surgery, weights
from holofunc.models.catalog import create, list_models, table
from holofunc.models.convnext import (
    convnext_atto,
    convnext_base,
    convnext_femto,
    convnext_large,
    convnext_nano,
    convnext_pico,
    convnext_small,
    convnext_tiny,
    convnext_xl,
)
from holofunc.models.darknet import cspdarknet53, cspdarknet53_mish, darknet19, darknet24, darknet53
from holofunc.models.deploy import reparametrize
from holofunc.models.detection import Detector
from holofunc.models.exporting import export
from holofunc.models.maps import features
from holofunc.models.mobileone import mobileone_s0, mobileone_s1, mobileone_s2, mobileone_s3
from holofunc.models.pyconv import pyconv_resnet50, pyconvhg_resnet50
from holofunc.models.recognition import character_classifier, ctc_recognizer
from holofunc.models.repvgg import repvgg_a0, repvgg_a1, repvgg_a2, repvgg_b0, repvgg_b1, repvgg_b2, repvgg_b3
from holofunc.models.repvit import repvit_m0_9, repvit_m1_0, repvit_m1_1
from holofunc.models.res2net import res2net50_26w_4s
from holofunc.models.resnet import (
    resnet18,
    resnet34,
    resnet50,
    resnet50d,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
)
from holofunc.models.rexnet import rexnet1_0x, rexnet1_3x, rexnet1_5x, rexnet2_0x, rexnet2_2x
from holofunc.models.sknet import sknet50, sknet101, sknet152
from holofunc.models.small import smallnet
from holofunc.models.tridentnet import tridentnet50
from holofunc.models.unet import unet, unetp, unetpp
from holofunc.models.unet3p import unet3p
from holofunc.models.unet_dynamic import dynamic_unet
from holofunc.models.unet_encoders import unet2, unet_rexnet13, unet_tvresnet34, unet_tvvgg11
from holofunc.models.yolo1 import yolov1
from holofunc.models.yolo2 import yolov2
from holofunc.models.yolo4 import yolov4
from holofunc.ops.targets import Detections, Targets

__all__ = [
    "Detections",
    "Detector",
    "Targets",
    "character_classifier",
    "convnext_atto",
    "convnext_base",
    "convnext_femto",
    "convnext_large",
    "convnext_nano",
    "convnext_pico",
    "convnext_small",
    "convnext_tiny",
    "convnext_xl",
    "create",
    "cspdarknet53",
    "cspdarknet53_mish",
    "ctc_recognizer",
    "darknet19",
    "darknet24",
    "darknet53",
    "dynamic_unet",
    "export",
    "features",
    "list_models",
    "mobileone_s0",
    "mobileone_s1",
    "mobileone_s2",
    "mobileone_s3",
    "pyconv_resnet50",
    "pyconvhg_resnet50",
    "reparametrize",
    "repvgg_a0",
    "repvgg_a1",
    "repvgg_a2",
    "repvgg_b0",
    "repvgg_b1",
    "repvgg_b2",
    "repvgg_b3",
    "repvit_m0_9",
    "repvit_m1_0",
    "repvit_m1_1",
    "res2net50_26w_4s",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet50d",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "rexnet1_0x",
    "rexnet1_3x",
    "rexnet1_5x",
    "rexnet2_0x",
    "rexnet2_2x",
    "sknet50",
    "sknet101",
    "sknet152",
    "smallnet",
    "surgery",
    "table",
    "tridentnet50",
    "unet",
    "unet2",
    "unet3p",
    "unet_rexnet13",
    "unet_tvresnet34",
    "unet_tvvgg11",
    "unetp",
    "unetpp",
    "weights",
    "yolov1",
    "yolov2",
    "yolov4",
]
