"""One optimisation step as the papers have it: rescaled gradient, L2 penalty, SGD, RMSprop or Adam."""

import torch
from torch import nn

from pipeline.params import Recipe


def initialise(model: nn.Module, recipe: Recipe) -> None:
    """Draws every parameter from U(-r, r) where the recipe gives r; else the layers' own initialisation stays."""
    if recipe.initial_range is not None:
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -recipe.initial_range, recipe.initial_range)


class Optimiser:
    """Applies a recipe's optimiser, learning-rate schedule, clipping and L2 penalty.

    The penalty adds `l2 * weight` to the gradient of every parameter: after the rescaling, as torch's own weight decay
    does, or before it (`l2_order`).
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = _torch_optimiser(self.parameters, recipe)

    def start_epoch(self, epoch: int) -> float:
        """Sets and returns the learning rate of an epoch (the first is 1)."""
        late = max(0, epoch - self.recipe.constant_epochs)
        rate = self.recipe.learning_rate * self.recipe.decay**late
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        return rate

    def step(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.update()

    def update(self) -> None:
        """Penalty, rescaling and the step itself, of gradients that are there."""
        if self.recipe.l2 and self.recipe.l2_order == "before_clip":
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=self.recipe.l2)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.optimiser.step()


def _torch_optimiser(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    rate = recipe.learning_rate
    l2 = recipe.l2 if recipe.l2_order == "after_clip" else 0.0
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=l2, fused=True)
    if recipe.optimiser == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=rate, alpha=recipe.alpha, eps=recipe.epsilon, weight_decay=l2)
    return torch.optim.Adam(parameters, lr=rate, betas=recipe.betas, eps=recipe.epsilon, weight_decay=l2, fused=True)
