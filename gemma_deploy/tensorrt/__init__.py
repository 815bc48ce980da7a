"""The TensorRT libraries, TensorRT and TensorRT for RTX, behind one door: `load_library`."""

from gemma_deploy.tensorrt.library import FLAVOURS, Flavour, TensorRTLibrary, load_library

__all__ = ["FLAVOURS", "Flavour", "TensorRTLibrary", "load_library"]
