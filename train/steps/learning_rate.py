"""The learning rate of a stage that goes on from a checkpoint: that of its schedule now, not of the one back then."""

from torch.optim.lr_scheduler import LambdaLR


def follow_plan(scheduler: LambdaLR) -> None:
    """Set the rate of the coming step to what the schedule says of it.

    A checkpoint brings the rate for its next step along, planned when it was written: nothing at the end of a cosine,
    where a stage that trains longer is in the middle of one. Where the plan is the same, so is the rate.
    """
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
