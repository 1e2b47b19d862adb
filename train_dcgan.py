"""Train a DCGAN on any folder of images, with the losses, schedules and tricks that people add to it.

    python train_dcgan.py                                            the built-in demo, some minutes on a CPU
    python train_dcgan.py --data ./sprites --size 64                 your own folder
    python train_dcgan.py --data ./sprites --smooth 0.1 --label-noise 0.05 --minibatch-discrimination
    python train_dcgan.py --data ./sprites --schedule boost          runs of steps that train one network only
    python train_dcgan.py --data ./sprites --loss relativistic       Huang et al. 2024, with R1 and R2
    python train_dcgan.py --resume runs/dcgan-sprites-1              go on after Ctrl-C as if it had never stopped
    python train_dcgan.py @runs/dcgan-sprites-1/args.txt             the same run once more

The networks and defaults are those of Radford et al. 2015 (arXiv 1511.06434), the loop is Algorithm 1 of Goodfellow et
al. 2014 (arXiv 1406.2661) with k = 1; its two objectives stand as comments where they are computed. Deviation: samples
come from the averaged G in eval mode; the networks' own deviations stand in gan.py.
"""

import copy
import functools

import torch

import cli
import data
import decode
import gan
import metrics
import plots
import runs
import runtime

# What follows from the loss: the optimizer's and the discriminator's settings of each paper.
PAPER = {
    "bce": dict(lr=2e-4, norm="batch", r1=0.0, r2=0.0),     # Radford et al. 2015
    "hinge": dict(lr=2e-4, norm="spectral", r1=0.0, r2=0.0),             # Miyato et al. 2018; Deviation: 1 D step of 5
    "relativistic": dict(lr=2e-4, norm="none", r1=1.0, r2=1.0),          # Huang et al. 2024; the weights are ours
}
BETAS = {"bce": (0.5, 0.999), "hinge": (0.0, 0.9), "relativistic": (0.0, 0.99)}
# The demo: teeth after some minutes on two cores.
DEMO = dict(size="32", features=32, batch=64, steps=2000, log_every=50, sample_every=100, save_every=500)
# The charts of losses.png: title and names of the numbers.
PANELS = [("losses (both are minimised)", ("loss_D", "loss_G")), ("scores of D before the update", ("D_x", "D_G_z")),
          *plots.QUALITY_PANELS]


def parse_arguments(argv=None):
    parser = cli.Parser("train_dcgan.py", __doc__, {
        **{f"--loss {name}": defaults for name, defaults in PAPER.items()}, "--data demo": DEMO})
    add = parser.add_argument_group("the method").add_argument
    add("--loss", default="bce", choices=PAPER, help="bce, non-saturating (Goodfellow et al. 2014); hinge (Miyato et "
        "al. 2018); relativistic, in pairs, with R1 and R2 (Huang et al. 2024) (default: bce)")
    add("--smooth", type=cli.number(float, 0, 0.5), default=0.0, help="label smoothing: D's target for real is 1 - "
        "SMOOTH (default: 0; Salimans et al. 2016: 0.1)")
    add("--two-sided", action="store_true", help="with --smooth, D's target for fake is SMOOTH (default: 0)")
    add("--label-noise", type=cli.number(float, 0, 0.5), default=0.0, metavar="P", help="share of the steps that train "
        "both networks in which D is told that real is fake and fake real (default: 0)")
    add("--schedule", default="classic", choices=("classic", "monitored", "boost"), help="which networks a step "
        "trains. classic: both; monitored: D only while its loss is over --monitor-ratio times G's last; boost: now "
        "and then a run of steps trains one only (default: classic)")
    add("--monitor-ratio", type=cli.nonnegative, default=0.8, metavar="RATIO", help="of --schedule monitored: D rests "
        "while its loss is under RATIO times G's last (default: 0.8)")
    add("--boost-d", type=cli.fraction, default=0.0009, metavar="P", help="of --schedule boost: chance that a step "
        "begins a run of D's (default: 0.0009)")
    add("--boost-g", type=cli.fraction, default=0.0001, metavar="P", help="of --schedule boost: chance that a step "
        "begins a run of G's (default: 0.0001)")
    add("--boost-length", type=cli.positive_int, default=100, metavar="K", help="of --schedule boost: steps in such a "
        "run (default: 100)")
    add("--r1", type=cli.nonnegative, metavar="GAMMA", help="weight of the zero-centred gradient penalty at real "
        "images (default: 0; relativistic: 1)")
    add("--r2", type=cli.nonnegative, metavar="GAMMA", help="weight of the zero-centred gradient penalty at fakes "
        "(default: 0; relativistic: 1)")
    data.add_arguments(parser)
    cli.add_arguments(parser)
    parser.set_defaults(batch=128, latent=100)                               # Radford et al. 2015, section 4
    return cli.parse_arguments(
        parser, argv, lambda args: {**PAPER[args.loss], **(DEMO if args.data == "demo" else {})}, check)


def check(args):
    """Raises ValueError, one sentence, for flags that cannot be or do not go together."""
    gan.grid_sizes(decode.parse_size(args.size))
    gan.diff_augment(torch.zeros(0, 1, 8, 8), args.augment)
    if (args.norm == "batch" or args.minibatch_discrimination) and (args.r1 or args.r2):
        raise ValueError("the gradient penalties --r1, --r2 do not go with --norm batch or --minibatch-discrimination: "
                         "D's score of one image would depend on the others; take --norm none, layer, instance or "
                         "spectral, or --r1 0 --r2 0")
    if args.smooth and args.loss != "bce":
        raise ValueError(f"--smooth is a target of the bce loss; {args.loss} has no targets")
    if args.two_sided and not args.smooth:
        raise ValueError("--two-sided says that --smooth holds for fakes too: give --smooth too, as in --smooth 0.1")
    if args.schedule == "monitored" and args.loss == "hinge":
        raise ValueError("--schedule monitored compares the losses, and G's hinge loss has no lower bound: take bce")
    if args.boost_d + args.boost_g > 1:
        raise ValueError("--boost-d and --boost-g are chances of one draw: their sum is at most 1")
    if args.graphs and (args.schedule != "classic" or args.label_noise):
        raise ValueError("--graphs records one order of operations: leave --schedule and --label-noise out")


@runtime.exit_on_user_error("train_dcgan.py")
def main(argv=None):
    args = parse_arguments(argv)
    run = runs.Run(args, "train_dcgan.py", images_per_step=args.batch)
    with runtime.rank0_first():
        dataset = data.load_from_args(args, "train", at_least=2)
    runtime.print_rank0(data.describe(args.data, dataset, run.images_per_step))

    channels, *size = dataset.images.shape[1:]
    G = gan.Generator(size, channels, args.latent, args.features, args.max_features, args.upsample)
    D = gan.Discriminator(size, channels, args.features, args.max_features, args.norm, args.minibatch_discrimination)
    G, D = (net.to(run.device, memory_format=torch.channels_last) for net in (G, D))
    runtime.print_rank0(f"G: {runtime.layer_shapes(G, args.latent)}\nD: {runtime.layer_shapes(D, channels, *size)}")
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    adam = dict(betas=BETAS[args.loss], fused=run.device.type != "mps")
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), args.lr, **adam) for net in (G, D))
    schedule = Schedule(args)
    state = dict(G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D, schedule=schedule)
    if args.evaluate_every:
        import evaluate
        report_quality = evaluate.make_evaluator(args, run, dataset.images)
    run.resume(state, images=dataset.fingerprint)

    images = data.batches(dataset.images, args.batch, args.seed, run.step, args.flip, run.device,
                          (run.rank, run.world_size))
    fixed_z = torch.randn(64, args.latent, generator=torch.Generator().manual_seed(args.seed)).to(run.device)
    real_batch = next(data.batches(dataset.images, min(64, len(dataset.images)), args.seed))
    run.write("real.png", plots.save_grid, real_batch)
    noise = functools.partial(torch.randn, args.batch, args.latent, device=run.device)
    augment = functools.partial(gan.diff_augment, policy=args.augment)

    def discriminator_loss(f_real, f_fake):
        if args.loss == "bce":
            return gan.bce_discriminator_loss(f_real, f_fake, args.smooth, args.two_sided)
        return {"hinge": gan.hinge_discriminator_loss,
                "relativistic": gan.relativistic_discriminator_loss}[args.loss](f_real, f_fake)

    def discriminator_step(real):                                            # x ~ p_data
        z = noise()                                                          # z ~ p(z)
        with run.amp:
            with torch.no_grad():                                            # G is not trained here: no graph
                fake = G(z)
            real, fake = augment(real), augment(fake)
            f_real, f_fake = D(real), D(fake)
            loss = discriminator_loss(f_real, f_fake)                        # maximise log D(x) + log(1 - D(G(z)))
            penalty = sum(gamma / 2 * gan.zero_centred_penalty(D, x)
                          for gamma, x in ((args.r1, real), (args.r2, fake)) if gamma)
        opt_D.zero_grad()
        (loss + penalty).backward()
        opt_D.step()
        scores = [f.detach().sigmoid() if args.loss == "bce" else f.detach() for f in (f_real, f_fake)]
        scalars = dict(loss_D=loss.detach(), D_x=scores[0].mean(), D_G_z=scores[1].mean())
        return scalars | (dict(penalty=penalty.detach()) if args.r1 or args.r2 else {})

    def generator_step(real):
        z = noise()                                                          # z ~ p(z), fresh
        with run.amp:
            f_fake = D(augment(G(z)))
            if args.loss == "bce":
                loss = gan.bce_generator_loss(f_fake)                        # maximise log D(G(z))
            elif args.loss == "hinge":
                loss = gan.generator_loss(f_fake)
            elif args.loss == "relativistic":
                with torch.no_grad():
                    f_real = D(augment(real))
                loss = gan.relativistic_generator_loss(f_real, f_fake)
        opt_G.zero_grad()
        loss.backward(inputs=list(G.parameters()))                           # no gradients for D's weights
        opt_G.step()
        return dict(loss_G=loss.detach())

    discriminator_step, generator_step = run.capture(discriminator_step), run.capture(generator_step)
    if args.schedule != "classic" or args.label_noise:                       # discriminator_step then sees its new loss
        discriminator_step, generator_step, discriminator_loss = schedule.wrap(
            discriminator_step, generator_step, discriminator_loss)
    for step in run.steps():                                                 # for number of training iterations do
        real = next(images)
        scalars = discriminator_step(real)
        scalars |= generator_step(real)
        # --------------------- the algorithm ends here; the rest is bookkeeping ---------------------
        gan.update_ema(G_ema, G, args.ema, step)
        if run.due(args.sample_every):
            samples = torch.cat([G_ema(z) for z in fixed_z.split(args.batch)])
            run.log_once(diversity_fake=metrics.diversity(samples), diversity_real=metrics.diversity(real_batch))
            run.write(f"samples/step-{step:07d}.png", plots.save_grid, samples)
        if run.due(args.evaluate_every):
            report_quality(G_ema, step)
        run.log(**scalars)
        if run.due(args.save_every):
            run.save(state, config=G.config)
            run.write(f"generators/step-{step:07d}.pt", gan.save_generator, G_ema)
            run.write("losses.png", plots.save_curves, runs.read_log(run.folder), PANELS)
    run.write("progress.gif", plots.save_gif, run.folder / "samples")


class Schedule:
    """--schedule and --label-noise, wrapped around the classic step; classic without noise is not wrapped.

    boost: a step outside a run begins a run of `boost_length` steps, itself included, of G with chance `boost_g`, else
    of D with chance `boost_d`. In the long run a share boost_d length / (boost_d length + boost_g length + 1 - boost_d
    - boost_g) of the steps trains D alone.
    monitored: D is trained if its loss on this step's batch, before the update, is over `monitor_ratio` times G's loss
    at its last update. label noise: in a share of the steps that train both, D's loss calls real fake and fake real.
    All is drawn on the CPU, by the first process for all. mode, left: "both", "D" or "G", and for how many more steps.
    """

    def __init__(self, args):
        self.args, self.mode, self.left, self.last_loss_G = args, "both", 0, None

    def wrap(self, discriminator_step, generator_step, discriminator_loss):
        """The three functions, the first two with the same arguments, as the flags have them."""
        args, swap = self.args, False

        class DRests(Exception):
            """Leaves the discriminator's step before its update."""

        def loss(f_real, f_fake):
            honest = discriminator_loss(f_real, f_fake)                      # else it would rest on true labels only
            if not self.trains_D(honest):
                raise DRests(honest.detach(), f_real.detach(), f_fake.detach())
            return discriminator_loss(f_fake, f_real) if swap else honest

        def step_D(real):
            nonlocal swap
            self.next_mode()
            swap = (self.mode == "both" and args.label_noise > 0
                    and runtime.broadcast_from_rank0(torch.rand(())) < args.label_noise)
            if self.mode == "G":
                return dict(trained_D=0.0)
            try:
                return {**discriminator_step(real), "trained_D": 1.0}
            except DRests as rest:
                loss_D, *scores = rest.args
                D_x, D_G_z = (f.sigmoid().mean() if args.loss == "bce" else f.mean() for f in scores)
                return dict(loss_D=loss_D, D_x=D_x, D_G_z=D_G_z, trained_D=0.0)

        def step_G(real):
            if self.mode == "D":
                return dict(trained_G=0.0)
            scalars = generator_step(real)
            self.last_loss_G = scalars["loss_G"]
            return {**scalars, "trained_G": 1.0}

        return step_D, step_G, loss

    def next_mode(self):
        """The mode of this step, decided before any update."""
        if self.left == 0:
            u = runtime.broadcast_from_rank0(torch.rand(())) if self.args.schedule == "boost" else 1.0
            self.mode = "G" if u < self.args.boost_g else "D" if u < self.args.boost_g + self.args.boost_d else "both"
            self.left = self.args.boost_length if self.mode != "both" else 1
        self.left -= 1
        return self.mode

    def trains_D(self, loss_D):
        if self.args.schedule != "monitored" or self.last_loss_G is None:
            return True
        return bool(runtime.broadcast_from_rank0(loss_D > self.args.monitor_ratio * self.last_loss_G.to(loss_D.device)))

    def state_dict(self):
        return {"now": self.mode, "left": self.left, "last_loss_G": self.last_loss_G}

    def load_state_dict(self, state):
        self.mode, self.left, self.last_loss_G = state["now"], state["left"], state["last_loss_G"]


if __name__ == "__main__":
    main()
