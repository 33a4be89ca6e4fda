"""`AttentiveReader`: question answering over a passage by attention (paper, section 5.4)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnrnn.kernels.reference import live_rows
from bnrnn.nn import share
from bnrnn.nn.feature_norm import FeatureNorm
from bnrnn.nn.initialization import orthogonal_
from bnrnn.nn.lstm import BNLSTM
from bnrnn.nn.options import (
    NormOptions,
    ReaderOptions,
    chosen,
    require,
    spell_out_options,
    take_options,
)

# The settings of each model in section 5.4 of the paper; only the last is bidirectional.
VARIANTS: dict[str, dict[str, Any]] = {
    "attentive_lstm": {
        "input_norm": "none", "recurrent_norm": "none", "cell_norm": "none",
        "attention_norm": False, "bidirectional": False,
    },
    "attentive_bnlstm": {
        "input_norm": "frame", "recurrent_norm": "frame", "cell_norm": "frame",
        "attention_norm": False, "bidirectional": False,
    },
    "attentive_bn_everywhere": {
        "input_norm": "frame", "recurrent_norm": "frame", "cell_norm": "frame",
        "attention_norm": True, "bidirectional": False,
    },
    "attentive_bne_star": {
        "input_norm": "sequence", "recurrent_norm": "frame", "cell_norm": "frame",
        "attention_norm": True, "bidirectional": False,
    },
    "attentive_bne_star_star": {
        "input_norm": "sequence", "recurrent_norm": "frame", "cell_norm": "frame",
        "attention_norm": True, "bidirectional": True,
    },
}  # fmt: skip


class AttentiveReader(nn.Module):
    """The Attentive Reader of Hermann et al. 2015, as Cooijmans et al. 2017 changed it.

    One LSTM encodes the passage (T steps) into states d_t; another encodes the question, and u is
    its last state. Both have one or two directions of H units; their states have size c = H or 2H.

        s_t = (B^T d_t) · (B^T u)
        M_t = tanh(BN(W_d d_t; γ, b_d) + BN(W_u u; γ, 0) + s_t 1)
        α   = softmax_t(w · M_t)                 over the passage's words, 0 at its padding
        r   = Σ_t α_t d_t
        d̄   = mean_t d_t                         over the passage's words
        g   = tanh(BN(W_c r; γ, 0) + BN(W_q u; γ, b_q) + BN(W_m d̄; γ, 0))
        logits = W_o g + b_o                     over the whole vocabulary

    Each BN has its own γ and statistics. Without `attention_norm` the terms are added without
    normalisation, with the biases b_d and b_q. s_t is never normalised. The model of Hermann et al.
    has neither s_t nor d̄. Both, and the dropout, are in the code of Cooijmans et al. but not in
    their paper. `VARIANTS` has the settings of the five models in its section 5.4.

    Args:
        vocabulary: V, the number of word ids; also the number of answers.
        hidden_size: H, the size of word vectors, LSTM states (each direction), attention and g.
        bidirectional: make both encoders bidirectional; padding is left out of the backward pass.
        input_norm, recurrent_norm, cell_norm: for both encoders, see `BNLSTM`.
        attention_norm: normalise the two terms of the attention and the three of g.
        gamma_init: initial γ everywhere.
        eps: ε, added to every variance, except where `sequence_eps` applies.
        sequence_eps: ε of sequence-wise statistics, see `BNLSTM`. None: `eps`.
        momentum: weight of a minibatch in the running averages.
        max_length: keep per-step statistics for at most this many steps. None: for the length of
            the longest training sequence.
        dropout: probability of dropping an element of a word vector or of g; the others are
            scaled up.
        mean_passage: add the term of d̄ to g.
        similarity: add s_t to the attention.
        mask_attention_statistics: leave padding out of the statistics of W_d d_t. Otherwise each
            padding position counts, with the final state of the forward encoder and zeros for the
            backward encoder, as in the authors' code.
        count_padding: let finished sequences count in the encoders' per-step statistics, with their
            final states, as in the authors' code. Otherwise the longest sequence of a batch is
            alone in its last steps; normalised over one row it becomes β, and u carries no
            information about the longest question.
        init: "sound", or "official_code", which is the initialisation of the authors' code:
            matrices of the same shape are initially equal, regardless of the seed, and those of the
            LSTMs are 0.05 times orthogonal matrices.
        learned_state: learn the encoders' h_0 instead of using zeros; c_0 stays zero. It applies
            only if the recurrent term is not normalised. BN subtracts everything that all rows
            share, so h_0 would have no effect, and its gradient would be rounding errors that Adam
            would scale up.
        forget_bias: initial bias of the forget gates; 0 in the authors' code.
        kernel: for both encoders, see `BNLSTM`.

    Parameters, initialised as "sound" | "official_code", where D(n) is an n x n orthogonal matrix
    times 0.05 and U(m, n) is uniform in ±sqrt(6 / (m + n + 1)):
        embedding.weight: (V, H), shared by passage and question; N(0, 1) | U(V, H).
        passage_encoder, question_encoder: see `BNLSTM` | every gate's W_x and W_h is D(H).
        bilinear: B, (c, c); orthogonal | D(c). If `similarity`.
        attention_passage.linear.weight: W_d, (H, c); orthogonal | D(H) if c = H, else U(c, H).
        attention_question.linear.weight: W_u, (H, c); orthogonal | U(c, H).
        attention_score.weight: w, (1, H); uniform in ±1 / sqrt(H) | the same.
        joint_attended, joint_question, joint_mean (if `mean_passage`), each `.linear.weight`:
            W_c, W_q, W_m, (H, c); orthogonal | U(c, H).
        output.weight, output.bias: W_o, (V, H), and b_o, (V,); orthogonal | U(H, V), and 0.
        `.norm.gamma` of each term, if `attention_norm`: (H,); `gamma_init`.
        b_d and b_q, in attention_passage and joint_question: `.norm.beta` if `attention_norm`, else
            `.linear.bias`, (H,); 0.

    Raises:
        ValueError: an argument is out of range.

    Example::

        reader = AttentiveReader(
            vocabulary=1000, hidden_size=240, **VARIANTS["attentive_bne_star_star"]
        )
        logits, attention = reader(passage, passage_lengths, question, question_lengths)
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        hidden_size: int,
        kernel: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = o = take_options(ReaderOptions, type(self).__name__, options)
        for name, value in (("vocabulary", vocabulary), ("hidden_size", hidden_size)):
            require(value > 0, name, value, "positive")
        self.vocabulary, self.hidden_size = vocabulary, hidden_size

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = hidden_size * (2 if o.bidirectional else 1)  # c

        def encoder() -> BNLSTM:
            own = chosen(NormOptions, o)
            own["learned_state"] = o.learned_state and o.recurrent_norm == "none"
            return BNLSTM(
                hidden_size, hidden_size, bidirectional=o.bidirectional, kernel=kernel,
                count_padding=o.count_padding, **own, **factory,
            )  # fmt: skip

        def term(bias: bool) -> _Term:
            norm = None
            if o.attention_norm:
                norm = FeatureNorm(
                    hidden_size,
                    beta=bias,
                    gamma_init=o.gamma_init,
                    eps=o.eps,
                    momentum=o.momentum,
                    **factory,
                )
            # β replaces b, because BN would cancel a bias in front of it.
            linear = nn.Linear(width, hidden_size, bias=bias and norm is None, **factory)
            return _Term(linear, norm)

        self.embedding = nn.Embedding(vocabulary, hidden_size, **factory)
        self.passage_encoder = encoder()
        self.question_encoder = encoder()
        self.bilinear = nn.Parameter(torch.empty(width, width, **factory)) if o.similarity else None
        self.attention_passage = term(bias=True)
        self.attention_question = term(bias=False)
        self.attention_score = nn.Linear(hidden_size, 1, bias=False, **factory)
        self.joint_attended = term(bias=False)
        self.joint_question = term(bias=True)
        self.joint_mean = term(bias=False) if o.mean_passage else None
        self.output = nn.Linear(hidden_size, vocabulary, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters as documented above and reset all statistics."""
        for encoder in (self.passage_encoder, self.question_encoder):
            encoder.reset_parameters()
            if encoder.options.learned_state:
                encoder.initial_cell.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, FeatureNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight)
        if self.bilinear is not None:
            orthogonal_(self.bilinear)
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.attention_score.weight, -bound, bound)
        if self.options.init == "official_code":
            self._reset_as_official_code()

    @torch.no_grad()
    def _reset_as_official_code(self) -> None:
        """Draw the matrices as the authors' code does, starting each from seed 123."""
        for encoder in (self.passage_encoder, self.question_encoder):
            for name, parameter in encoder.named_parameters():
                if name.startswith("weight"):
                    for gate in parameter.chunk(4):
                        _fill(gate, _small_orthogonal(self.hidden_size))
        if self.bilinear is not None:
            self.bilinear.copy_(torch.from_numpy(_small_orthogonal(len(self.bilinear))))
        vectors = _uniform(self.vocabulary, self.hidden_size)
        self.embedding.weight.copy_(torch.from_numpy(vectors))
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.attention_score:
                _fill(module.weight, _uniform(module.in_features, module.out_features))
        if not self.options.bidirectional:
            _fill(self.attention_passage.linear.weight, _small_orthogonal(self.hidden_size))

    def forward(
        self,
        passage: Tensor,
        passage_lengths: Tensor,
        question: Tensor,
        question_lengths: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Read a batch of passages and questions.

        Args:
            passage: (T, B) int64, word ids in 0..V - 1.
            passage_lengths: (B,) int64 in 1..T. The word ids in the padding have no effect.
            question: (Q, B) int64, as `passage`.
            question_lengths: (B,) int64 in 1..Q.

        Returns:
            logits: (B, V).
            attention: α, (T, B); each column sums to 1, and padding has 0.

        Raises:
            ValueError: shapes, dtypes or lengths do not match, or batch statistics are requested
                for a batch of one example.
            IndexError: an id is out of range.
            RuntimeError: the model is evaluated before it was trained or calibrated.
        """
        _check("passage", passage, passage_lengths)
        _check("question", question, question_lengths)
        if passage.shape[1] != question.shape[1]:
            raise ValueError(f"{passage.shape[1]} passages, but {question.shape[1]} questions")
        passage_lengths = passage_lengths.to(passage.device)
        question_lengths = question_lengths.to(question.device)

        d, d_last = self._encode(self.passage_encoder, passage, passage_lengths)
        _, u = self._encode(self.question_encoder, question, question_lengths)
        live = live_rows(passage_lengths, len(passage))  # (T, B, 1)

        if self.options.mask_attention_statistics:
            document = self.attention_passage(d, live[:, :, 0])
        else:
            document = self.attention_passage(torch.where(live, d, self._carried(d_last)))
        terms = document + self.attention_question(u)
        if self.bilinear is not None:
            # Compute s_t as d_t · (B B^T u): this multiplies B by one vector rather than by T.
            s = torch.einsum("tbc,bc->tb", d, u @ self.bilinear @ self.bilinear.t())
            terms = terms + s[:, :, None]
        score = self.attention_score(torch.tanh(terms))  # (T, B, 1)
        attention = score.masked_fill(~live, -torch.inf).softmax(0).squeeze(2)

        r = torch.einsum("tb,tbc->bc", attention, d)
        joint = self.joint_attended(r) + self.joint_question(u)
        if self.joint_mean is not None:
            joint = joint + self.joint_mean(d.sum(0) / passage_lengths[:, None])
        g = share.dropout(torch.tanh(joint), self.options.dropout, self.training, 0)
        return self.output(g), attention

    def _encode(self, encoder: BNLSTM, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States (T, B, c), zero at padding, and the last states of the directions, (B, c)."""
        x = share.dropout(self.embedding(words), self.options.dropout, self.training)
        # If padding counts in per-step statistics, it counts as zero vectors, not as words.
        x = torch.where(live_rows(lengths, len(words)), x, 0.0)
        states, (h_n, _) = encoder(x, lengths=lengths)
        return states, torch.cat(h_n.unbind(0), dim=1)

    def _carried(self, last: Tensor) -> Tensor:
        """d_t at padding in the authors' code: the last forward state, and 0 for the backward."""
        if not self.options.bidirectional:
            return last
        forwards, backwards = last.chunk(2, dim=1)
        return torch.cat([forwards, torch.zeros_like(backwards)], dim=1)

    def extra_repr(self) -> str:
        return f"init={self.options.init}, dropout={self.options.dropout}"


spell_out_options(AttentiveReader.__init__, ReaderOptions)


class _Term(nn.Module):
    """One term in the argument of a tanh: W y + b, or BN(W y; γ, b)."""

    def __init__(self, linear: nn.Linear, norm: FeatureNorm | None) -> None:
        super().__init__()
        self.linear, self.norm = linear, norm

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """y (..., c) -> (..., H); `mask` (...) marks what counts in batch statistics."""
        y = self.linear(y)
        return y if self.norm is None else self.norm(y, mask)


def _check(name: str, words: Tensor, lengths: Tensor) -> None:
    if words.dim() != 2 or words.dtype != torch.long or words.numel() == 0:
        raise ValueError(
            f"{name} must be (steps, batch) int64 and not empty; "
            f"got shape {tuple(words.shape)} of {words.dtype}"
        )
    steps, batch = words.shape
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(
            f"{name}_lengths must be ({batch},) integers; "
            f"got shape {tuple(lengths.shape)} of {lengths.dtype}"
        )
    # Only on the CPU: elsewhere, reading the lengths would wait for the device.
    if lengths.is_cpu and (int(lengths.min()) < 1 or int(lengths.max()) > steps):
        raise ValueError(f"{name}_lengths must be in 1..{steps}")


def _fill(weight: Tensor, matrix: np.ndarray) -> None:
    """Transpose: the authors' code multiplies matrices by row vectors from the left."""
    weight.copy_(torch.from_numpy(matrix.T))


def _uniform(rows: int, columns: int) -> np.ndarray:
    bound = (6 / (rows + columns + 1)) ** 0.5
    return np.random.RandomState(123).uniform(-bound, bound, (rows, columns))


def _small_orthogonal(size: int) -> np.ndarray:
    u, _, vh = np.linalg.svd(_uniform(size, size))
    return 0.05 * u @ vh.T


__all__ = ["VARIANTS", "AttentiveReader"]
