"""A BN-LSTM in the style of public PyTorch ports: a Python loop over time that does everything.

This is a baseline for benchmarks, not for use. It multiplies the input step by step, as they do. It
is faster than most of them, because batch normalisation is PyTorch's fused operator and the
statistics of all steps are in one buffer each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLoopBNLSTM(nn.Module):
    def __init__(self, input_size: int, hidden_size: int, steps: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        self.gamma_ih = nn.Parameter(torch.full((4 * hidden_size,), 0.1))
        self.gamma_hh = nn.Parameter(torch.full((4 * hidden_size,), 0.1))
        self.gamma_c = nn.Parameter(torch.full((hidden_size,), 0.1))
        self.beta_c = nn.Parameter(torch.zeros(hidden_size))
        nn.init.orthogonal_(self.weight_ih)
        nn.init.orthogonal_(self.weight_hh)
        for term, features in (("ih", 4), ("hh", 4), ("c", 1)):
            self.register_buffer("mean_" + term, torch.zeros(steps, features * hidden_size))
            self.register_buffer("var_" + term, torch.ones(steps, features * hidden_size))

    def forward(self, input: Tensor) -> Tensor:
        """input (T, B, D); output (T, B, H)."""
        h = c = input.new_zeros(input.shape[1], self.weight_hh.shape[1])
        outputs = []
        for t in range(len(input)):
            from_input = self._normalize(t, "ih", input[t] @ self.weight_ih.t(), self.gamma_ih)
            from_state = self._normalize(t, "hh", h @ self.weight_hh.t(), self.gamma_hh)
            i, f, g, o = (from_input + from_state + self.bias).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(self._normalize(t, "c", c, self.gamma_c, self.beta_c))
            outputs.append(h)
        return torch.stack(outputs)

    def _normalize(
        self, t: int, term: str, y: Tensor, gamma: Tensor, beta: Tensor | None = None
    ) -> Tensor:
        mean, var = self.get_buffer("mean_" + term)[t], self.get_buffer("var_" + term)[t]
        return F.batch_norm(y, mean, var, gamma, beta, self.training, 0.1, 1e-5)
