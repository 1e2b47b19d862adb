"""The loop that most repositories copy, to train beside ours. Do not copy it.

    python baseline.py wgan --data ./faces --size 64        a run like one of train_wgan.py, with its flags
    python baseline.py dcgan --data ./faces --size 64       like one of train_dcgan.py

Images, split and networks are those of the two scripts, and its runs are read as theirs. The loop is not: fp32,
channels first, a DataLoader that decodes every image every epoch, fakes that carry G's graph into D's step, unfused
Adam, .item() every step, samples of the latest weights; WGAN-GP: instance norm in D, n_critic updates on the same real
images, the last of which gives G its fakes. Of the method's flags only --lr, --n-critic and --lam count; --flip,
--augment and --minibatch-discrimination do nothing, and no samples are drawn or scored.
"""

import functools
import itertools
import sys

import numpy as np
import torch
from torch import nn

import cli
import data
import decode
import gan
import runs
import runtime
import sources
import train_dcgan
import train_wgan


class Images(torch.utils.data.Dataset):
    """Decode, resize, normalise, for every image, in every epoch. names: of those to read (default: all)."""

    def __init__(self, source, size, channels=3, fit="crop", crop="", names=None):
        reads = {item.name: item.read for item in sources.find_items(source)}
        self.reads = [reads[name] for name in names or reads]
        self.preprocess = decode.Preprocess(tuple(size), fit, crop, str(channels))
        self.reads[0]()                                      # the demo is drawn here, not by each worker

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, k):
        pixels = np.array(self.preprocess.pixels(self.reads[k]())[0]).reshape(*self.preprocess.size, -1)
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def dcgan_step(args, G, D, opt_G, opt_D, real, noise):
    criterion = nn.BCEWithLogitsLoss()
    fake = G(noise())
    output = D(real)
    loss_real = criterion(output, torch.ones_like(output))
    output = D(fake)
    loss_fake = criterion(output, torch.zeros_like(output))
    loss_D = loss_real + loss_fake
    opt_D.zero_grad()
    loss_D.backward(retain_graph=True)                       # fake is not detached: G's gradients are computed too
    opt_D.step()
    output = D(fake)
    loss_G = criterion(output, torch.ones_like(output))
    opt_G.zero_grad()
    loss_G.backward()
    opt_G.step()
    return dict(loss_D=loss_D.item(), loss_G=loss_G.item())


def wgan_step(args, G, D, opt_G, opt_D, real, noise):
    for _ in range(args.n_critic):                           # on the same real images
        fake = G(noise())
        alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
        mixed = alpha * real + (1 - alpha) * fake
        scores = D(mixed)
        gradient = torch.autograd.grad(scores, mixed, torch.ones_like(scores), True, True)[0]
        penalty = ((gradient.view(len(gradient), -1).norm(2, dim=1) - 1) ** 2).mean()
        loss_D = -(D(real).mean() - D(fake).mean()) + args.lam * penalty
        opt_D.zero_grad()
        loss_D.backward(retain_graph=True)
        opt_D.step()
    loss_G = -D(fake).mean()                                 # the last of D's fakes
    opt_G.zero_grad()
    loss_G.backward()
    opt_G.step()
    return dict(loss_D=loss_D.item(), loss_G=loss_G.item())


METHODS = {"dcgan": (train_dcgan, dcgan_step, "batch", (0.5, 0.999)),
           "wgan": (train_wgan, wgan_step, "instance", (0.0, 0.9))}


def parse_arguments(argv=None):
    """The method and its flags."""
    argv = sys.argv[1:] if argv is None else argv
    parser = cli.Parser("baseline.py", __doc__)
    parser.add_argument("method", choices=METHODS, help="the flags that follow are those of its training script")
    method = parser.parse_args(argv[:1]).method
    return method, METHODS[method][0].parse_arguments(argv[1:])


@runtime.exit_on_user_error("baseline.py")
def main(argv=None):
    method, args = parse_arguments(argv)
    _, train, norm, betas = METHODS[method]
    if vars(args).get("constraint", "gp") != "gp" or vars(args).get("loss", "bce") != "bce":
        raise runtime.UserError("baseline.py: there is only --constraint gp of wgan and --loss bce of dcgan")
    args.norm, args.precision, args.ema = norm, "fp32", 0.0
    run = runs.Run(args, f"baseline.py {method}", args.batch)
    dataset = data.load_from_args(args, "train", at_least=args.batch)
    channels, *size = dataset.images.shape[1:]
    images = Images(args.data, size, channels, args.fit, args.crop, dataset.names)
    loader = torch.utils.data.DataLoader(images, args.batch, shuffle=True, num_workers=2, drop_last=True)

    G = gan.Generator(size, channels, args.latent, args.features, args.max_features, args.upsample).to(run.device)
    D = gan.Discriminator(size, channels, args.features, args.max_features, norm).to(run.device)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), args.lr, betas) for net in (G, D))
    state = dict(G=G, D=D, G_ema=G, adam_G=opt_G, adam_D=opt_D)     # ours cannot go on with it
    run.resume(state, images=dataset.fingerprint)
    noise = functools.partial(torch.randn, args.batch, args.latent, device=run.device)

    for _, real in zip(run.steps(), itertools.chain.from_iterable(itertools.repeat(loader))):
        run.log(**train(args, G, D, opt_G, opt_D, real.to(run.device), noise))
        if run.due(args.save_every):
            run.save(state, config=G.config)


if __name__ == "__main__":
    main()
