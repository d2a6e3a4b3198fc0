"""What the UNet is told about a picture: every condition of the paper's Table 5 and Figure 1, and the tagging
adapter.

Sections 3.3 and 3.4. Each condition is a module with the same call, `adapter(image_tokens, image_embedding,
text)`, which returns the context T(c) that the UNet attends to. Image tokens, image embedding and text
vectors come from the frozen CLIP (clip.py); those that a condition does not read may be None.

Top to bottom: what goes in and out, the five simple conditions, the tagging adapter (Eq. 6), its multi-label
objective (Eq. 7, the asymmetric loss and its targets), and the parts of the adapter.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from errors import ModelError

IGNORE = 255  # the label of pixels that belong to no class


class Text(NamedTuple):
    """What the words of each picture became.

    vectors `(B, T, C)`: one pooled vector per tag, padded to the longest list, or the 77 hidden states of a
    prompt; lengths `(B,)`: how many are real (1..T), None = all of them.
    """

    vectors: Tensor
    lengths: Tensor | None = None


class Condition(NamedTuple):
    """What the UNet attends to: context `(B, L, C)`, or `(1, L, C)` where it is the same for every picture;
    lengths `(B,)` as in `Text`; and Eq. 7's tag logits `(B, K)`.
    """

    context: Tensor
    lengths: Tensor | None = None
    logits: Tensor | None = None


class Unconditional(nn.Module):
    """`none`: the empty prompt for every picture (section 3.3, 1). empty `(77, C)`: the states of ""."""

    def __init__(self, empty: Tensor):
        super().__init__()
        self.register_buffer("empty", frozen(empty))

    def forward(
        self, image_tokens: Tensor | None, image_embedding: Tensor | None, text: Text | None
    ) -> Condition:
        return Condition(self.empty[None])  # (1, 77, C)


class Caption(nn.Module):
    """`caption`: the 77 hidden states of a caption of each picture (section 3.3, 2)."""

    def forward(
        self, image_tokens: Tensor | None, image_embedding: Tensor | None, text: Text | None
    ) -> Condition:
        assert text is not None, "text is None: give the hidden states of one caption per picture"
        return Condition(text.vectors, text.lengths)


class Oracle(nn.Module):
    """`oracle`: the vectors of the classes that are truly in the picture, straight to the UNet (Figure 1).

    It reads the labels, so what it gives is a bound and no result. A picture without classes is the caller's
    business: it passes the empty prompt's vector.
    """

    def forward(
        self, image_tokens: Tensor | None, image_embedding: Tensor | None, text: Text | None
    ) -> Condition:
        assert text is not None, "text is None: give the vectors of each picture's true classes"
        return Condition(text.vectors, text.lengths)


class Classes(nn.Module):
    """`classes`: T(c) = E + gamma MLP(E) over the vectors E of all K class names (Eq. 4).

    VPD's text adapter (vpd/models.py, `TextAdapter`): K tokens, the same for every picture. classes `(K, C)`.
    """

    def __init__(self, classes: Tensor):
        super().__init__()
        C = classes.shape[1]
        self.register_buffer("classes", frozen(classes))
        self.mlp = mlp(C, C)
        self.gamma = nn.Parameter(torch.full((C,), 1e-4))  # VPD segmentation/models/vpd_seg.py

    def forward(
        self, image_tokens: Tensor | None, image_embedding: Tensor | None, text: Text | None
    ) -> Condition:
        context = self.classes + self.gamma * self.mlp(self.classes)
        return Condition(context[None])  # (1, K, C)


class Implicit(nn.Module):
    """`implicit`: a caption made from the image embedding (Eq. 5), behind a gate that starts shut.

    The context of ODISE's implicit captioner (odise/modeling/meta_arch/ldm.py): Eq. 5's MLP is one Linear,
    whose output is repeated at 77 positions, plus a learned position embedding, times tanh(alpha), added to
    the empty prompt. Its other branch, which moves the time embedding, is left out: Eq. 5 is a text
    condition. empty `(77, C)`.

    At the start the context is exactly the empty prompt and alpha alone has a gradient; one step later all
    have one.
    """

    def __init__(self, empty: Tensor, embedding_width: int = 768):
        super().__init__()
        C = empty.shape[1]
        self.register_buffer("empty", frozen(empty))
        self.linear = nn.Linear(embedding_width, C)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(empty.shape), std=0.02))  # ODISE's
        self.alpha = nn.Parameter(torch.zeros(empty.shape))

    def forward(
        self, image_tokens: Tensor | None, image_embedding: Tensor | None, text: Text | None
    ) -> Condition:
        assert image_embedding is not None, "image_embedding is None: give CLIP's, (B, 768)"
        caption = self.linear(image_embedding)[:, None] + self.position  # (B, 77, C)
        return Condition(self.empty + self.alpha.tanh() * caption)


class Tagging(nn.Module):
    """`tagging`: learned queries read the tags and the picture, and become the context (Eq. 6; Figure 2 b).

    empty `(77, C)`: the hidden states of ""; classes `(K, C)`: the vectors of the class names, which are Eq.
    7's frozen classifier, and the text of every picture where none is given (`text=None`). 25,612,034
    trainable parameters at the default sizes, whatever K is. A picture without tags is the caller's business:
    it passes the empty prompt's vector.

    With start "random" the context is m. With start "empty" it is E("")[:Q] + g m, g from 0: at first exactly
    the empty prompt's first Q tokens, and the UNet's gradient reaches g alone; the rest learns from Eq. 7,
    or, where that has no weight, one step later. Whatever the start, log_scale and bias learn from Eq. 7
    alone. Which start learns more: `python -m lab.ablate --rows
    "tagging, loss, tags" "tagging from the empty prompt"`.
    """

    def __init__(
        self,
        empty: Tensor,
        classes: Tensor,
        image_width: int = 1024,
        heads: int = 8,
        queries: int = 32,
        blocks: int = 2,
        start: str = "random",
    ):
        super().__init__()
        P, C = empty.shape
        if start not in ("empty", "random"):
            raise ModelError(f"the adapter starts from {start!r}: give 'empty' or 'random'")
        if queries < 1 or blocks < 1:
            raise ModelError(f"{queries} queries and {blocks} blocks are no adapter: give 1 of each or more")
        if start == "empty" and queries > P:
            raise ModelError(
                f"{queries} queries start from the {P} tokens of the empty prompt: give at most {P}, "
                "or start 'random'"
            )

        self.register_buffer("classes", frozen(classes))
        self.queries = nn.Parameter(torch.randn(queries, C))  # as large as SD's own tokens: norm sqrt(C)
        self.image = nn.Linear(image_width, C)
        self.blocks = nn.ModuleList(Block(C, heads) for _ in range(blocks))
        self.mlp = mlp(C, C)
        self.norm = nn.LayerNorm(C)

        from_empty = start == "empty"
        self.register_buffer("empty", frozen(empty[:queries]) if from_empty else None)
        self.register_parameter("g", nn.Parameter(torch.zeros(C)) if from_empty else None)

        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # ours, as is the bias; see `logits`
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(
        self, image_tokens: Tensor | None, image_embedding: Tensor | None, text: Text | None
    ) -> Condition:
        q, text, image = self.prepare(image_tokens, text)
        for block in self.blocks:
            q = block(q, text, image)
        m = self.norm(self.mlp(q))  # (B, Q, C); its norm is that of SD's own tokens

        context = m if self.g is None else self.empty + self.g * m
        return Condition(context, None, self.logits(m))

    def attention(self, image_tokens: Tensor, text: Text | None) -> Tensor:
        """How much each query attends to each tag in the last block, `(B, Q, T)`, sum 1 over the tags."""
        q, text, image = self.prepare(image_tokens, text)
        *first, last = self.blocks
        for block in first:
            q = block(q, text, image)
        return last.attention_weights(q, text)

    def prepare(self, image_tokens: Tensor | None, text: Text | None) -> tuple[Tensor, Text, Tensor]:
        """What the blocks take: queries `(B, Q, C)`, text, image `(B, M, C)`."""
        assert image_tokens is not None, "image_tokens is None: give CLIP's, (B, 257, 1024)"
        B = len(image_tokens)
        if text is None:
            text = Text(self.classes.expand(B, -1, -1))
        self.check(text, B)
        return self.queries.expand(B, -1, -1), text, self.image(image_tokens)

    def check(self, text: Text, B: int) -> None:
        """The border: shapes alone, so that no device is waited for."""
        (rows, T, width), C = text.vectors.shape, self.classes.shape[1]
        assert (rows, width) == (B, C) and T > 0, (
            f"the text is {tuple(text.vectors.shape)}: give at least one vector per picture, ({B}, T, {C})"
        )
        assert text.lengths is None or text.lengths.shape == (B,), (
            f"lengths is {tuple(text.lengths.shape)}: give one number of vectors per picture, ({B},)"
        )

    def logits(self, m: Tensor) -> Tensor:
        """Eq. 7 before its sigmoid, `(B, Q, C)` -> `(B, K)` float32: s cos(Pool(m), h_k - mean h) + b, h
        frozen.

        The paper prints the product (Pool(m), h_k), which saturates: that of two of CLIP's class vectors is
        about 365, of one with itself 799. Centred they no longer share a direction; s and b are learned.
        """
        h = self.classes.float()
        pooled = m.float().mean(dim=1)  # (B, C)
        # Products and sums, not a matmul, which autocast would round: (B, K)
        cosine = F.cosine_similarity(pooled[:, None], h - h.mean(dim=0), dim=-1)
        return self.log_scale.exp() * cosine + self.bias


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Sum over classes and images, and the number of images: `(B, K)` logits, `(B, K)` targets in {0, 1} ->
    scalars.

    A class that is there costs -(1 - p) ** gamma_positive * log p; one that is not, -(1 - q) **
    gamma_negative * log q with q = min(1 - p + clip, 1), which forgives a p below clip. The focusing weights
    are constants: they carry no gradient. In float32, whatever comes in: eps is 0 in float16. Values,
    gradients and defaults are those of Ridnik et al. (Alibaba-MIIL/ASL src/loss_functions/losses.py,
    `AsymmetricLoss`).
    """
    assert logits.shape == targets.shape, f"{tuple(logits.shape)} logits for {tuple(targets.shape)} targets"
    logits, there = logits.float(), targets > 0.5
    p_right = torch.where(there, logits.sigmoid(), ((-logits).sigmoid() + clip).clamp(max=1))  # (B, K)
    gamma = torch.where(there, gamma_positive, gamma_negative)
    weight = (1 - p_right.detach()) ** gamma
    loss = -weight * p_right.clamp(min=eps).log()
    return loss.sum(), loss.new_full((), len(loss))


def multi_hot(labels: Tensor, K: int) -> Tensor:
    """The multi-label target: labels of crops `(B, H, W)` int64, 0..K-1 or 255 = ignore -> `(B, K)` float32,
    0 or 1.
    """
    assert 1 <= K <= IGNORE, f"{K} classes: labels have room for 1 to {IGNORE}"
    seen = torch.zeros(len(labels), IGNORE + 1, device=labels.device)
    return seen.scatter_(1, labels.flatten(1), 1.0)[:, :K]


class Block(nn.Module):
    """Queries attend to themselves, the text and the picture, then an MLP; each pre-norm and added to its
    input.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attend_self = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attend_text = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.attend_image = Attention(width, heads)
        self.norm4 = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width)

    def forward(self, q: Tensor, text: Text, image: Tensor) -> Tensor:
        q = self.self_attend(q)
        q = q + self.attend_text(self.norm2(q), *text)
        q = q + self.attend_image(self.norm3(q), image)
        return q + self.mlp(self.norm4(q))

    def self_attend(self, q: Tensor) -> Tensor:
        """The queries, each having attended to all."""
        q_norm = self.norm1(q)
        return q + self.attend_self(q_norm, q_norm)

    def attention_weights(self, q: Tensor, text: Text) -> Tensor:
        """How much each query attends to each tag here, the mean of the heads `(B, Q, T)`."""
        return self.attend_text.attention_weights(self.norm2(self.self_attend(q)), *text)


class Attention(nn.Module):
    """Multi-head attention of the queries `(B, Q, C)` to the tokens `(B, M, C)`, of which `lengths (B,)` are
    real.

    Keys have no bias, since it would add the same to every score of a query; nor have queries and values,
    as in the UNet.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ModelError(f"{heads} heads do not divide the adapter's width of {width}: give a divisor")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(tokens), self.to_v(tokens)
        q, k, v = (rearrange(y, "B M (n d) -> B n M d", n=self.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=real(tokens, lengths))
        return self.to_out(rearrange(y, "B n Q d -> B Q (n d)"))

    def attention_weights(self, x: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The softmax inside `forward`, the mean of the heads `(B, Q, M)` float32."""
        q, k = (rearrange(y, "B M (n d) -> B n M d", n=self.heads) for y in (self.to_q(x), self.to_k(tokens)))
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (B, n, Q, M)
        if lengths is not None:
            scores = scores.masked_fill(~real(tokens, lengths), -torch.inf)
        return scores.softmax(dim=-1).mean(dim=1)


def real(tokens: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Which of the tokens `(B, M, C)` are real, `(B, 1, 1, M)`: for every head and query; None = all."""
    if lengths is None:
        return None
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (B, M)
    return mask[:, None, None]


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Width C -> hidden -> C, with a GELU in the middle."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def frozen(vectors: Tensor) -> Tensor:
    """A copy that is no one else's: buffers are saved with the checkpoint, where no two may share memory."""
    return vectors.detach().clone()
