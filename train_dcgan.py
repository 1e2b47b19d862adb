"""Train a DCGAN on any folder of pictures, with the schedules and tricks that people add to it.

    python train_dcgan.py                                            the built-in demo, some minutes on a CPU
    python train_dcgan.py --data ./sprites --size 64                 your own folder
    python train_dcgan.py --data ./sprites --smooth 0.1 --label-noise 0.05 --minibatch-discrimination
    python train_dcgan.py --data ./sprites --schedule boost          runs of steps that train one network only
    python train_dcgan.py --data ./sprites --loss relativistic       Huang et al. 2024, with R1 and R2
    python train_dcgan.py --resume runs/dcgan-sprites-1              go on after Ctrl-C, exactly
    python train_dcgan.py @runs/dcgan-sprites-1/args.txt             the same run once more

The networks and defaults are those of Radford et al. 2015 (arXiv 1511.06434), the loop is Algorithm 1 of Goodfellow et
al. 2014 (arXiv 1406.2661) with k = 1; its two objectives stand as comments where they are computed.
"""

import copy

import torch

import data
import gan
import metrics
import plots
import runtime

# What follows from the loss: the optimizer's and the discriminator's settings of each paper.
PAPER = {
    "bce": dict(lr=2e-4, norm="batch", r1=0.0, r2=0.0),     # Radford et al. 2015
    "hinge": dict(lr=2e-4, norm="spectral", r1=0.0, r2=0.0),             # Miyato et al. 2018
    "relativistic": dict(lr=2e-4, norm="none", r1=1.0, r2=1.0),          # Huang et al. 2024; the weights are ours
}
BETAS = {"bce": (0.5, 0.999), "hinge": (0.0, 0.9), "relativistic": (0.0, 0.99)}


# What suits the demo: small enough to show teeth after some minutes on two cores.
DEMO = dict(size="32", features=32, batch=64, steps=2000, log_every=50, sample_every=100, save_every=500)


# The charts of losses.png: title and numbers of the log.
PANELS = [("losses (both are minimised)", ("loss_D", "loss_G")), ("scores of D before the update", ("D_x", "D_G_z")),
          ("spread: how far two pictures lie apart", ("spread_fake", "spread_real")),
          ("FID of the averaged G, at --evaluate-n pictures", ("fid",)), ("KID of the same", ("kid",))]


def parse_arguments(argv=None):
    parser = runtime.Parser("train_dcgan.py", __doc__, {
        **{f"--loss {name}": defaults for name, defaults in PAPER.items()}, "--data demo": DEMO})
    add = parser.add_argument_group("the method").add_argument
    add("--loss", default="bce", choices=PAPER, help="bce, non-saturating (Goodfellow et al. 2014); hinge (Miyato et "
        "al. 2018); relativistic, in pairs, with R1 and R2 (Huang et al. 2024) (bce)")
    add("--smooth", type=runtime.number(float, 0, 0.5), default=0.0, help="D's target for real is 1 - SMOOTH "
        "(0; Salimans et al. 2016: 0.1)")
    add("--two-sided", action="store_true", help="and its target for fake is SMOOTH")
    add("--label-noise", type=runtime.number(float, 0, 0.5), default=0.0, metavar="P", help="share of the steps "
        "that train both in which D is told that real is fake and fake real (0)")
    add("--minibatch-discrimination", action="store_true", help="D sees how alike a batch is (Salimans et al. 2016)")
    add("--schedule", default="classic", choices=("classic", "monitored", "boost"), help="classic, each step trains "
        "both; monitored, D only while its loss is over RATIO x G's last; boost, now and then a run of steps trains "
        "one network only (classic)")
    add("--monitor-ratio", type=runtime.nonnegative, default=0.8, metavar="RATIO", help="of monitored (0.8)")
    add("--boost-d", type=runtime.fraction, default=0.0009, metavar="P", help="chance that a step begins a run of "
        "D's (0.0009)")
    add("--boost-g", type=runtime.fraction, default=0.0001, metavar="P", help="chance that a step begins a run of "
        "G's (0.0001)")
    add("--boost-length", type=runtime.positive_int, default=100, metavar="N", help="steps in such a run (100)")
    add("--r1", type=runtime.nonnegative, metavar="GAMMA", help="weight of the zero-centred penalty at real pictures (0; "
        "relativistic: 1)")
    add("--r2", type=runtime.nonnegative, metavar="GAMMA", help="the same at fakes (0; relativistic: 1)")
    data.add_arguments(parser)
    runtime.add_arguments(parser)
    parser.set_defaults(batch=128, latent=100)                               # Radford et al. 2015, section 4
    args = runtime.parse_arguments(
        parser, argv, lambda args: {**PAPER[args.loss], **(DEMO if args.data == "demo" else {})})
    for reason in contradictions(args):
        parser.error(reason)
    return args


def contradictions(args):
    """Why these flags do not go together, a sentence each."""
    penalty = args.r1 > 0 or args.r2 > 0
    couples = [flag for flag, given in (("--norm batch", args.norm == "batch"),
                                        ("--minibatch-discrimination", args.minibatch_discrimination)) if given]
    if penalty and couples:
        cure = "--norm none, layer, instance or spectral" if args.norm == "batch" else "--r1 0 --r2 0"
        yield (f"{' and '.join(couples)} cannot go with the penalties --r1 {args.r1:g} --r2 {args.r2:g}, which are on "
               f"the slope at each picture, and this makes D's score of one picture depend on the others; take {cure}")
    if args.smooth and args.loss != "bce":
        yield f"--smooth is a target of the bce loss; {args.loss} has no targets"
    if args.two_sided and not args.smooth:
        yield "--two-sided says that --smooth holds for fakes too: give --smooth as well, as in --smooth 0.1"
    if args.schedule == "monitored" and args.loss == "hinge":
        yield "--schedule monitored compares the losses of D and G, and G's hinge loss has no lower bound: take bce"
    if args.boost_d + args.boost_g > 1:
        yield "--boost-d and --boost-g are chances of one draw: their sum is at most 1"


class Schedule:
    """Which networks a step trains. Drawn from torch's CPU random numbers, so that a resumed run draws the same; under
    torchrun the first process draws for all.

    mode(): "both", "D" or "G", one mode a step, decided before any update. boost: a step outside a run begins a run of
        `length` steps, itself included, of G with chance `boost_g`, else of D with chance `boost_d`. In the long run a
        share boost_d length / (boost_d length + boost_g length + 1 - boost_d - boost_g) of the steps trains D alone.
    trains_D(loss_D): monitored compares D's loss on this step's batch, before the update, with `ratio` times G's loss
        at its last update (an earlier step); the first step always trains. The comparison is the one point where the
        host waits for the device. Other schedules never look at the loss.
    """

    def __init__(self, kind, ratio=0.8, boost_d=0.0009, boost_g=0.0001, length=100):
        self.kind, self.ratio, self.boost_d, self.boost_g, self.length = kind, ratio, boost_d, boost_g, length
        self.now, self.left, self.last_loss_G = "both", 0, None

    def mode(self):
        if self.left == 0:
            k = runtime.broadcast_from_rank0(torch.rand(())) if self.kind == "boost" else 1.0
            self.now = "G" if k < self.boost_g else "D" if k < self.boost_g + self.boost_d else "both"
            self.left = self.length if self.now != "both" else 1
        self.left -= 1
        return self.now

    def trains_D(self, loss_D):
        if self.kind != "monitored" or self.last_loss_G is None:
            return True
        return bool(runtime.broadcast_from_rank0(loss_D > self.ratio * self.last_loss_G.to(loss_D.device)))

    def state_dict(self):
        return {"now": self.now, "left": self.left, "last_loss_G": self.last_loss_G}

    def load_state_dict(self, state):
        self.now, self.left, self.last_loss_G = state["now"], state["left"], state["last_loss_G"]


def main(argv=None):
    args = parse_arguments(argv)
    with runtime.exit_on_user_error("train_dcgan.py"):
        size = data.parse_size(args.size)
        gan.grid_sizes(size), gan.diff_augment(torch.zeros(0, 1, 8, 8), args.augment)    # a mistake is said before reading
        run = runtime.Run(args, "train_dcgan.py", images_per_step=args.batch)
        pictures = data.load_from_args(args, "train", at_least=2)
        runtime.print_rank0("\n".join(data.describe(args.data, pictures)))

        channels = pictures.images.shape[1]
        G = gan.Generator(size, channels, args.latent, args.features, args.max_features, args.upsample)
        D = gan.Discriminator(size, channels, args.features, args.max_features, args.norm,
                              args.minibatch_discrimination)
        G, D = (net.to(run.device, memory_format=torch.channels_last) for net in (G, D))
        G_ema = copy.deepcopy(G).eval().requires_grad_(False)
        fused = run.device.type != "mps"
        opt_G, opt_D = (torch.optim.Adam(net.parameters(), args.lr, BETAS[args.loss], fused=fused) for net in (G, D))
        schedule = Schedule(args.schedule, args.monitor_ratio, args.boost_d, args.boost_g, args.boost_length)
        state = dict(G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D, schedule=schedule)
        judge = None
        if args.evaluate_every:
            import evaluate

            judge = evaluate.make_evaluator(args, run, pictures.images)
        run.resume(state, pictures=pictures.fingerprint)

    images = data.batches(pictures.images, args.batch, args.seed, run.step, args.flip, run.device,
                          (run.rank, run.world_size))
    shown = torch.randn(64, args.latent, generator=torch.Generator().manual_seed(args.seed)).to(run.device)
    real_sheet = next(data.batches(pictures.images, min(64, len(pictures.images)), args.seed))
    run.write("real.png", plots.save_grid, real_sheet)
    amp = run.amp

    def latent():
        return torch.randn(args.batch, args.latent, device=run.device)

    def discriminator_loss(f_real, f_fake):
        if args.loss == "bce":
            return gan.bce_discriminator_loss(f_real, f_fake, args.smooth, args.two_sided)
        return {"hinge": gan.hinge_discriminator_loss,
                "relativistic": gan.relativistic_discriminator_loss}[args.loss](f_real, f_fake)

    def discriminator_step(real, swap):
        z = latent()                                                         # z ~ p(z)
        with amp:
            with torch.no_grad():                                            # G is not trained here: no graph
                fake = G(z)
            real, fake = (gan.diff_augment(x, args.augment) for x in (real, fake))
            f_real, f_fake = D(real), D(fake)
            # maximise log D(x) + log(1 - D(G(z))); a swap calls real fake and fake real
            honest = discriminator_loss(f_real, f_fake)
            loss = discriminator_loss(f_fake, f_real) if swap else honest
            penalty = sum(gamma / 2 * gan.zero_centred_penalty(D, x)
                          for gamma, x in ((args.r1, real), (args.r2, fake)) if gamma)
        trains = schedule.trains_D(honest)                                   # else it would rest on true labels only
        if trains:
            opt_D.zero_grad()
            (loss + penalty).backward()
            opt_D.step()
        scores = [f.detach().sigmoid() if args.loss == "bce" else f.detach() for f in (f_real, f_fake)]
        return dict(loss_D=loss.detach(), trained_D=float(trains), D_x=scores[0].mean(), D_G_z=scores[1].mean())

    def generator_step(real):
        z = latent()                                                         # z ~ p(z), fresh
        with amp:
            f_fake = D(gan.diff_augment(G(z), args.augment))
            if args.loss == "bce":
                loss = gan.bce_generator_loss(f_fake)                        # maximise log D(G(z))
            elif args.loss == "hinge":
                loss = gan.generator_loss(f_fake)
            else:
                with torch.no_grad():
                    f_real = D(gan.diff_augment(real, args.augment))
                loss = gan.relativistic_generator_loss(f_real, f_fake)
        opt_G.zero_grad()
        loss.backward(inputs=list(G.parameters()))                           # no gradients for D's weights
        opt_G.step()
        schedule.last_loss_G = loss.detach()
        return dict(loss_G=loss.detach())

    waits = "--schedule monitored looks at the loss" * (args.schedule == "monitored")
    discriminator_step, generator_step = run.capture(discriminator_step, waits), run.capture(generator_step)
    for step in run.steps():                                                 # for number of training iterations do
        real, mode, scores = next(images), schedule.mode(), {}               # x ~ p_data
        swap = mode == "both" and args.label_noise > 0 and runtime.broadcast_from_rank0(torch.rand(())) < args.label_noise
        if mode != "G":
            scores.update(discriminator_step(real, swap=swap))
        if mode != "D":
            scores.update(generator_step(real))
        # --------------------- the algorithm ends here; the rest is bookkeeping ---------------------
        if mode != "D":
            gan.update_ema(G_ema, G, args.ema, step)
        if run.due(args.sample_every):
            sheet = torch.cat([G_ema(z) for z in shown.split(args.batch)])
            run.log_once(spread_fake=metrics.diversity(sheet), spread_real=metrics.diversity(real_sheet))
            run.write(f"samples/step-{step:07d}.png", plots.save_grid, sheet)
        if judge and run.due(args.evaluate_every):
            judge(G_ema, step)
        run.log(trained_G=float(mode != "D"), **scores)
        if run.due(args.save_every):
            run.save(state, config=G.config)
            run.write(f"generators/step-{step:07d}.pt", lambda path: torch.save(gan.generator_state(G_ema), path))
            run.write("losses.png", plots.save_curves, run.history(), PANELS)
        if run.due(args.steps):                                              # on the last step only: it takes a while
            run.write("progress.gif", plots.save_gif, run.folder / "samples")
    if args.data == "demo":
        runtime.print_rank0("your own pictures:\n    python train_dcgan.py --data YOUR_FOLDER --size 64")


if __name__ == "__main__":
    runtime.run_main(main, "train_dcgan.py")
