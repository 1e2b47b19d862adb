"""Train pix2pix: images from images, on pairs or on pairs made of any folder of single images.

    python train_pix2pix.py                                              the built-in demo: fill holes, minutes on a CPU
    python train_pix2pix.py --data ./faces --task complete --flip        fill holes of any shape
    python train_pix2pix.py --data ./faces --task colorize               grey to colour
    python train_pix2pix.py --data ./faces --task enhance                small and noisy to large and clean
    python train_pix2pix.py --data ./faces --task edges                  line drawing to image
    python train_pix2pix.py --data ./facades --task pairs --size 256     files side by side, or folders A and B
    python train_pix2pix.py --resume runs/pix2pix-faces-1                go on after Ctrl-C

The networks, the objective and the defaults are those of Isola et al. 2017 (arXiv 1611.07004): a U-Net G turns x into
G(x), a PatchGAN D tells (x, y) from (x, G(x)), and G* = arg min_G max_D L_cGAN(G, D) + lambda L_L1(G), its eq. 4.
Deviations: images are mirrored only with --flip (left and right differ in a radiograph); all samples come from the
averaged G in eval mode, where the paper's G keeps its dropout.
"""

import copy

import torch

import cli
import data
import decode
import gan
import inpainting
import metrics
import pairs
import plots
import runs
import runtime

# Defaults of the paper (sections 3.3, 6.2); of each task (lambda: 100 is the paper's; complete has L1 over the hole, of
# a quarter 4 times as large; no jitter for colour, as in section 6.2, nor for enhance, which it blurs); and of the
# demo: few steps, teeth in place.
PAPER = dict(batch=4, lr=2e-4, norm="instance")
TASKS = {"complete": dict(l1=25.0, warm_up=1000), **dict.fromkeys(("edges", "pairs"), dict(l1=100.0, warm_up=0)),
         **dict.fromkeys(("colorize", "enhance"), dict(l1=100.0, warm_up=0, jitter=1.0))}
DEMO = dict(size="32", features=32, batch=16, steps=1500, warm_up=200, jitter=1.0, decay=0.0, sample_every=100,
            save_every=500)
# The charts of losses.png: title and names in the log.
PANELS = [("losses (both are minimised)", ("loss_D", "loss_G")),
          ("L1 in training and on held-out images; complete: of the hole", ("l1", "l1_heldout")),
          ("PSNR in dB on held-out images, beside the baseline without learning", ("psnr_heldout", "psnr_baseline")),
          ("probabilities that D gives before the update", ("D_x", "D_G_z"))]


def parse_arguments(argv=None):
    parser = cli.Parser("train_pix2pix.py", __doc__, {
        "every --task": PAPER, **{f"--task {name}": defaults for name, defaults in TASKS.items()}, "--data demo": DEMO})
    add = parser.add_argument_group("the method").add_argument
    add("--task", default="complete", choices=TASKS, help="what G learns: complete (fill holes), colorize, enhance, "
        "edges (from line drawings), all on pairs made of single images; or pairs, as on disk (default: complete)")
    add("--direction", default="AtoB", choices=("AtoB", "BtoA"), help="of --task pairs; A is the left half, or the "
        "folder A (default: AtoB)")
    add("--mask", default="center,box,strokes,half,random", metavar="KINDS", help="of --task complete: kinds of holes, "
        "drawn equally often, and an image may be one, black in the hole (default: %(default)s)")
    add("--factor", type=cli.number(float, 1), default=4.0, help="of --task enhance: downsampling (default: 4)")
    add("--noise", type=cli.nonnegative, default=0.05, help="of --task enhance: standard deviation of the noise in "
        "the input, for images in [-1, 1] (default: 0.05)")
    add("--l1", type=cli.nonnegative, metavar="LAMBDA", help="lambda, the weight of L1 (default: 100, Isola et al. "
        "2017; with --task complete 25, over the hole alone)")
    add("--warm-up", type=cli.number(int, 0), metavar="N", help="steps with L1 alone before D is trained (default: "
        "0; with --task complete 1000)")
    add("--jitter", type=cli.number(float, 1, 2), default=1.117, metavar="FACTOR", help="enlarge images by FACTOR and "
        "crop at a random place; 1: off (default: 1.117 = 286/256, Isola et al. 2017; colorize and enhance: 1)")
    add("--decay", type=cli.fraction, default=0.5, metavar="SHARE", help="last share of --steps, also of new ones "
        "on --resume, in which --lr falls linearly to 0; 0: never (default: 0.5, as in the authors' PyTorch code)")
    add("--depth", type=cli.number(int, 0), default=0, help="halvings in the U-Net; 0: log2 of the shorter side, at "
        "most 8 (default: 0)")
    add("--dropout", type=cli.fraction, default=0.5, help="in the inner levels of the U-Net (default: 0.5)")
    add("--n-layers", type=cli.number(int, 0, 7), default=0, help="halvings in D; with 1, 2 or 3 it judges "
        "patches of 16, 34 or 70 pixels; 0: what suits the size (default: 0)")
    data.add_arguments(parser)
    cli.add_arguments(parser, without=("--latent", "--minibatch-discrimination", "--augment", "--evaluate-every",
                                       "--evaluate-n", "--evaluate-network", "--graphs"))
    parser.set_defaults(**PAPER)
    return cli.parse_arguments(
        parser, argv, lambda args: {**TASKS[args.task], **(DEMO if args.data == "demo" else {})}, check)


def check(args):
    """Raises ValueError, one sentence, for flags that cannot be or do not go together."""
    if args.task == "pairs" and (args.data == "demo" or args.classes):
        raise ValueError("--task pairs: the demo has single images, and --classes chooses among such; give a folder of "
                         "pairs, as in --data ./maps")
    size = decode.parse_size(args.size)
    gan.grid_sizes(size)
    for flag, value, low, high in (("--depth", args.depth, 2, min(size).bit_length() - 1),
                                   ("--n-layers", args.n_layers, 1, (min(size) // 3).bit_length() - 1)):
        if value and not low <= value <= high:
            raise ValueError(f"{flag}: expected 0 or {low} to {high} at --size {args.size}, got {value}")


def save_examples(path, *columns):
    """Images (N, C, H, W) side by side, as x | G(x) | y, all grey or all colour; a mask channel is not shown."""
    columns = [t[:, :3] if t.shape[1] >= 3 else t[:, :1] for t in columns]
    x = torch.stack(torch.broadcast_tensors(*columns), 1).flatten(0, 1)
    plots.save_grid(path, *((x[:96], 12) if x.shape[3] <= 128 else (x[:36], 6)))


@runtime.exit_on_user_error("train_pix2pix.py")
def main(argv=None):
    args = parse_arguments(argv)
    size = decode.parse_size(args.size)
    run = runs.Run(args, "train_pix2pix.py", images_per_step=args.batch)
    load = pairs.load_pairs if args.task == "pairs" else data.load_from_args
    with runtime.rank0_first():
        dataset, heldout = load(args, "train", at_least=2), load(args, "heldout", at_least=0)
    runtime.print_rank0(data.describe(args.data, dataset, run.images_per_step))
    if not heldout.names:
        runtime.print_rank0("data: no image is held out; what is called held-out is measured on training images")
        heldout = dataset
    make_pairs = pairs.PairMaker(args, dataset.images)
    x, y, m = make_pairs(next(data.batches(dataset.images, min(64, len(dataset.images)), args.seed)).to(run.device), 0)
    pairs.check_pairs(x, y, m, args.data)

    n_layers = args.n_layers or (1 if min(size) < 48 else 2 if min(size) < 128 else 3)
    G = gan.UNet(size, *make_pairs.channels, args.features, args.max_features, args.depth, args.dropout,
                 "none" if args.norm == "spectral" else args.norm, args.upsample)
    D = gan.PatchGAN(sum(make_pairs.channels), args.features, args.max_features, n_layers, args.norm)
    G, D = (net.to(run.device, memory_format=torch.channels_last) for net in (G, D))
    runtime.print_rank0(f"G: {runtime.layer_shapes(G, make_pairs.channels[0], *size)}\n"
                        f"D: {runtime.layer_shapes(D, sum(make_pairs.channels), *size)}")
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    adam = dict(betas=(0.5, 0.999), fused=run.device.type != "mps")
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), args.lr, **adam) for net in (G, D))
    state = dict(G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)
    run.resume(state, images=dataset.fingerprint)

    images = data.batches(dataset.images, args.batch, args.seed, run.step, args.flip, run.device,
                          (run.rank, run.world_size))
    fixed_batch = next(data.batches(heldout.images, min(64, len(heldout.images)), args.seed)).to(run.device)
    fixed_x, fixed_y, fixed_m = make_pairs(fixed_batch, 0)
    psnr_baseline = metrics.psnr(fixed_y, pairs.baseline(fixed_x, fixed_y, fixed_m), 2, fixed_m).mean()
    run.write("pairs.png", save_examples, x, y, (y - pairs.baseline(x, y, m)).abs() - 1)

    def keep_known(out, y, m):
        return out if m is None else inpainting.composite(y, out, m)         # D sees the known pixels as they are

    def discriminator_step(x, y, fake):
        with run.amp:
            f_real, f_fake = D(torch.cat([x, y], 1)), D(torch.cat([x, fake], 1))
            loss = gan.bce_discriminator_loss(f_real, f_fake) / 2            # log D(x, y) + log(1 - D(x, G(x))), halved
        opt_D.zero_grad()
        loss.backward()
        opt_D.step()
        return dict(loss_D=loss, D_x=f_real.sigmoid().mean(), D_G_z=f_fake.sigmoid().mean())

    def generator_step(x, y, m, fake, adversarial):
        with run.amp:
            l1 = gan.l1_loss(y, fake, m)                                     # L_L1(G), eq. 3
            loss = gan.bce_generator_loss(D(torch.cat([x, fake], 1))) if adversarial else 0          # -log D(x, G(x))
        opt_G.zero_grad()
        (loss + args.l1 * l1).backward(inputs=list(G.parameters()))          # eq. 4; no gradients for D's weights
        opt_G.step()
        return dict(loss_G=loss, l1=l1) if adversarial else dict(l1=l1)

    for step in run.steps():
        adversarial = step > args.warm_up
        for group in (*opt_G.param_groups, *opt_D.param_groups):
            group["lr"] = args.lr * min(1, (args.steps - step + 1) / max(args.decay * args.steps, 1))   # to 0
        x, y, m = make_pairs(next(images), step)                             # x, y ~ p_data
        with run.amp:
            fake = keep_known(G(x), y, m)                                    # G(x)
        scalars = discriminator_step(x, y, fake.detach()) if adversarial else {}   # one gradient descent step on D,
        scalars |= generator_step(x, y, m, fake, adversarial)                # then one step on G: section 3.3
        # --------------------- the algorithm ends here; the rest is bookkeeping ---------------------
        gan.update_ema(G_ema, G, args.ema, step)
        if run.due(args.sample_every):
            out = keep_known(torch.cat([G_ema(x) for x in fixed_x.split(args.batch)]), fixed_y, fixed_m)
            run.log_once(psnr_heldout=metrics.psnr(fixed_y, out, 2, fixed_m).mean(), psnr_baseline=psnr_baseline,
                         l1_heldout=gan.l1_loss(fixed_y, out, fixed_m))
            run.write(f"samples/step-{step:07d}.png", save_examples, fixed_x, out, fixed_y)
        run.log(**scalars)
        if run.due(args.save_every):
            run.save(state, config=G.config, network="UNet")
            run.write(f"generators/step-{step:07d}.pt", gan.save_generator, G_ema)
            run.write("losses.png", plots.save_curves, runs.read_log(run.folder), PANELS)
    run.write("progress.gif", plots.save_gif, run.folder / "samples")


if __name__ == "__main__":
    main()
