"""Converts the weights of VGG16 and LPIPS from PyTorch's files to the .npz that `perceptual="lpips"` reads.

    python tools/lpips_to_npz.py vgg16.pth lpips_vgg.pth lpips.npz

`vgg16.pth` is torchvision's (ImageNet, `features.N.weight`), `lpips_vgg.pth` the linear heads of the LPIPS release
(`linN.model.1.weight`). Needs PyTorch.
"""

import sys

import numpy as np
import torch


def main(vgg: str, linear: str, out: str) -> None:
    """Reads the two files and writes the third."""
    features = torch.load(vgg, map_location="cpu", weights_only=True)
    heads = torch.load(linear, map_location="cpu", weights_only=True)
    layers = sorted({int(name.split(".")[1]) for name in features if name.startswith("features.")})
    arrays = {}
    for number, layer in enumerate(layers):
        arrays[f"conv{number}/kernel"] = features[f"features.{layer}.weight"].numpy().transpose(2, 3, 1, 0)
        arrays[f"conv{number}/bias"] = features[f"features.{layer}.bias"].numpy()
    for stage in range(5):
        arrays[f"linear{stage}"] = heads[f"lin{stage}.model.1.weight"].numpy().reshape(-1)
    np.savez(out, **arrays)
    print(f"wrote {len(layers)} convolutions and 5 linear layers to {out}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
