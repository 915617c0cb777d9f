"""The equations of Direct Preference Knowledge Distillation (arXiv 2406.19774) and its baselines, on tensors only.

p is the teacher, q the student that is trained, y_t the teacher's response (chosen), y_s the student's (rejected).
Log-probs are in nats, lengths in tokens. B is the number of pairs, N of tokens, K of likeliest tokens that the
teacher stored at each position, Y of responses. Only the student's log-probs carry a gradient; float32 and float64 do.

An entry of config/objectives.py names its equation here. A parameter without a default is one of the objective's
settings, or a tensor by its name in `TENSORS` of training/objectives.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 0.2  # ε: an importance weight of minillm is at most 1 + ε
OFF_POLICY_CLIP = 4.0  # the same of the off-policy correction: q/b counts up to 5


def implicit_reward(student_logps: Tensor, teacher_logps: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """r̂(x, y) = β/|y| · log q(y|x)/p(y|x): eq. 29, divided by the response's length as eq. 9 does. All [B]."""
    return beta * (student_logps - teacher_logps) / lengths


# --- Pairs: every log-prob is a sum over the tokens of a response (EOS included where it was sampled), [B] to [B] ---


def dpkd_loss(
    student_chosen_logps: Tensor,
    student_rejected_logps: Tensor,
    teacher_chosen_logps: Tensor,
    teacher_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> Tensor:
    """DPKD, eq. 9: L = -log σ( β/|y_t| log q(y_t)/p(y_t) - β/|y_s| log q(y_s)/p(y_s) )."""
    chosen_rewards = implicit_reward(student_chosen_logps, teacher_chosen_logps, chosen_lengths, beta)
    rejected_rewards = implicit_reward(student_rejected_logps, teacher_rejected_logps, rejected_lengths, beta)
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def dpkd_sum_loss(
    student_chosen_logps: Tensor,
    student_rejected_logps: Tensor,
    teacher_chosen_logps: Tensor,
    teacher_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """DPKD without length normalisation, eq. 8: L = -log σ( β log q(y_t)/p(y_t) - β log q(y_s)/p(y_s) )."""
    logratios = (student_chosen_logps - teacher_chosen_logps) - (student_rejected_logps - teacher_rejected_logps)
    return -F.logsigmoid(beta * logratios)


def ipo_loss(
    student_chosen_logps: Tensor,
    student_rejected_logps: Tensor,
    teacher_chosen_logps: Tensor,
    teacher_rejected_logps: Tensor,
    tau: float,
) -> Tensor:
    """IPO, table 2: L = ( log q(y_t)/p(y_t) - log q(y_s)/p(y_s) - 1/(2τ) )²."""
    logratios = (student_chosen_logps - teacher_chosen_logps) - (student_rejected_logps - teacher_rejected_logps)
    return (logratios - 1 / (2 * tau)) ** 2


def cpo_loss(student_chosen_logps: Tensor, student_rejected_logps: Tensor, beta: float) -> Tensor:
    """CPO, table 2: L = -[ log σ( β log q(y_t) - β log q(y_s) ) + log q(y_t) ].

    Table 2 prints y_t on both sides of the ratio, and a minus before the last term, which would unlearn y_t; this is
    CPO as its own paper has it (arXiv 2401.08417).
    """
    return -F.logsigmoid(beta * (student_chosen_logps - student_rejected_logps)) - student_chosen_logps


def simpo_loss(
    student_chosen_logps: Tensor,
    student_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO, table 2: L = -log σ( β/|y_t| log q(y_t) - β/|y_s| log q(y_s) - γ )."""
    margins = student_chosen_logps / chosen_lengths - student_rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * margins - gamma)


def chosen_nll(student_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """-log q(y_t)/|y_t|, the anchor beside a loss of pairs: it holds the student to the teacher's responses."""
    return -student_chosen_logps / chosen_lengths


# --- Off policy ---


def off_policy_weights(student_logps: Tensor, behavior_logps: Tensor) -> Tensor:
    """min(q/b, 5) of each token of stored responses y_s, [N] to [N], without a gradient.

    Algorithm 1 samples y_s anew from q at every step, so that E_q[∇ log q(y_n|x, y_<n)] = 0 at every position: pushing
    y_s down moves nothing on average. Stored y_s are of an earlier student b, and pushed down for ever. Weighted by
    q/b, E_b[q/b ∇ log q] = E_q[∇ log q] is zero again after any prefix. What remains of the bias: prefixes are still
    drawn from b, and the weight of a pair depends on its whole y_s. A weight for the whole response, q(y_s)/b(y_s),
    has none, but its variance grows with every token. Both are measured on a model small enough to enumerate every
    response (tests/training/test_off_policy.py), and so is min(q/b, 1): it keeps more of the bias, because a token that
    the student has come to prefer would be pushed down too little.
    """
    return importance_weights(student_logps.detach(), behavior_logps, OFF_POLICY_CLIP)


def scale_gradient(values: Tensor, weights: Tensor) -> Tensor:
    """The same values, of which each has its gradient multiplied by its weight."""
    return values.detach() + weights * (values - values.detach())


# --- Tokens: [N, K] or [N] to [N] ---


def lm_loss(logps: Tensor) -> Tensor:
    """L_pt: mean negative log-prob per token of `logps` [N], a scalar."""
    return -logps.mean()


def token_nll(student_logps: Tensor) -> Tensor:
    """SFT and sequence-level distillation: -log q of each token of a response, [N]."""
    return -student_logps


def forward_kl(student_top_logps: Tensor, teacher_top_logps: Tensor) -> Tensor:
    """Word-level KD: KL(p‖q) = Σ_k p_k log p_k/q_k, over the teacher's K likeliest tokens and all others as one.

    Both are log-probs [N, K] of the same K tokens. At most the KL over the whole vocabulary, and equal to it where q
    spreads what is left as p does.
    """
    return _kl(_with_rest(teacher_top_logps), _with_rest(student_top_logps))


def reverse_kl(student_top_logps: Tensor, teacher_top_logps: Tensor) -> Tensor:
    """KL(q‖p) = Σ_k q_k log q_k/p_k, over the same tokens as `forward_kl`, and like it at most the whole one.

    In float32 what is left of p counts as 2⁻²³ at least, so that what is left of q adds at most 16 nats times its
    probability, however unlikely it is under p.
    """
    return _kl(_with_rest(student_top_logps), _with_rest(teacher_top_logps))


def acceptance(student_top_logps: Tensor, teacher_top_logps: Tensor) -> Tensor:
    """Σ_k min(p_k, q_k) = 1 - TV(p, q), over the same tokens as `forward_kl`, and at least that of all tokens.

    The rate at which speculative decoding (arXiv 2211.17192) accepts a token that the student drafts for the teacher.
    """
    return torch.minimum(_with_rest(teacher_top_logps), _with_rest(student_top_logps)).exp().sum(-1)


def adaptive_kl(student_top_logps: Tensor, teacher_top_logps: Tensor, mu: float = 0.5) -> Tensor:
    """AKL (Wu et al. 2024, arXiv 2404.02657): g_head/(g_head + g_tail) KL(p‖q) + g_tail/(g_head + g_tail) KL(q‖p).

    The head is the fewest of the likeliest tokens whose p reaches `mu`, the tail all others, those beyond the K as
    one; g is the sum of |p - q| over the part. The weights carry no gradient. The K tokens lie likeliest for the
    teacher first. The authors' code leaves the token that reaches `mu` to the tail, unless it is the first of all;
    this is the paper's set.
    """
    p, q = _with_rest(teacher_top_logps), _with_rest(student_top_logps)
    with torch.no_grad():
        gaps = (p.exp() - q.exp()).abs()
        before = F.pad(teacher_top_logps.exp().cumsum(-1)[:, :-1], (1, 0))  # [N, K], what the likelier ones have of p
        in_head = F.pad(before < mu, (0, 1))
        total = gaps.sum(-1).clamp(min=torch.finfo(gaps.dtype).tiny)
        head, tail = ((gaps * part).sum(-1) / total for part in (in_head, ~in_head))
    return head * _kl(p, q) + tail * _kl(q, p)


def skew_kl(student_top_logps: Tensor, teacher_top_logps: Tensor, skew_alpha: float) -> Tensor:
    """Skew KL (Ko et al. 2024, arXiv 2402.03898): KL(p‖αp + (1 - α)q), over the same tokens as `forward_kl`.

    `forward_kl` where α is 0, and never above -log α.
    """
    p, q = _with_rest(teacher_top_logps), _with_rest(student_top_logps)
    return _kl(p, _mixture(p, q, skew_alpha))


def skew_reverse_kl(student_top_logps: Tensor, teacher_top_logps: Tensor, skew_alpha: float) -> Tensor:
    """Skew reverse KL (the same paper): KL(q‖(1 - α)p + αq), with a gradient through both q.

    `reverse_kl` where α is 0, and never above -log α. The code of DistiLLM-2 takes the q of the mixture as a constant.
    """
    p, q = _with_rest(teacher_top_logps), _with_rest(student_top_logps)
    return _kl(q, _mixture(q, p, skew_alpha))


def jensen_shannon(student_top_logps: Tensor, teacher_top_logps: Tensor, jsd_beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2024, arXiv 2306.13649, eq. 1), m = βp + (1 - β)q:

        D = β KL(p‖m) + (1 - β) KL(q‖m),

    over the same tokens as `forward_kl`. D/β is KL(p‖q) as β goes to 0, D/(1 - β) is KL(q‖p) as β goes to 1. Never
    above ln 2.
    """
    p, q = _with_rest(teacher_top_logps), _with_rest(student_top_logps)
    mixture = _mixture(p, q, jsd_beta)
    return jsd_beta * _kl(p, mixture) + (1 - jsd_beta) * _kl(q, mixture)


def dpkd_token_loss(
    student_logps_of_teacher_token: Tensor,
    student_logps_of_student_token: Tensor,
    teacher_logps_of_teacher_token: Tensor,
    teacher_logps_of_student_token: Tensor,
    beta: float,
) -> Tensor:
    """DPKD as its authors' code has it: L = -log σ( β [ log q(a_t)/q(a_s) - log p(a_t)/p(a_s) ] ), a per position.

    a_t is the teacher's likeliest token at a position of the data, a_s the student's. All [N]. Where both are the same
    token, the loss is ln 2 and has no gradient.
    """
    student_logratios = student_logps_of_teacher_token - student_logps_of_student_token
    teacher_logratios = teacher_logps_of_teacher_token - teacher_logps_of_student_token
    return -F.logsigmoid(beta * (student_logratios - teacher_logratios))


def logps_from_top(ids: Tensor, top_ids: Tensor, top_logps: Tensor, vocab_size: int) -> Tensor:
    """log p of the tokens `ids` [N] from what was stored of p: the K likeliest tokens [N, K] and their log-probs.

    A token that is not among them gets an even part of what they leave to the other `vocab_size` - K tokens. An id
    below 0 stands for none, where a position has fewer than K.
    """
    is_token = top_ids == ids[:, None]
    others = (vocab_size - (top_ids >= 0).sum(-1)).clamp(min=1)  # with all tokens stored, none of `ids` is another
    stored = torch.where(is_token, top_logps, 0.0).sum(-1)
    return torch.where(is_token.any(-1), stored, _rest(top_logps) - others.double().log().to(top_logps.dtype))


def importance_weights(student_logps: Tensor, behavior_logps: Tensor, clip: float = CLIP) -> Tensor:
    """min(q/b, 1 + ε) [N]: how much more a sampled token counts under the student than under the one that sampled."""
    return (student_logps - behavior_logps).clamp(max=math.log1p(clip)).exp()  # the clamp first: exp may overflow


def minillm_loss(
    student_logps: Tensor,
    behavior_logps: Tensor,
    teacher_logps: Tensor,
    reverse_kls: Tensor,
    lengths: Tensor,
    clip: float = CLIP,
) -> Tensor:
    """MiniLLM (Gu et al. 2024, arXiv 2306.08543) on stored responses y_s: a surrogate [N] with the paper's gradient

        w_t ∇KL_t  -  R_{t+1} ∇min(ρ_t, 1 + ε),    ρ_t = q(y_t)/b(y_t),  R_{t+1} = mean of log p/q over t' > t,

    whose first term is the single-step part, the second the long part, normalised by length. b is the student that
    sampled, KL_t = KL(q‖p) at position t (`reverse_kl`), w_t = min(ρ_t, 1 + ε), ε = `clip`. w and R carry no gradient.
    As a value it means nothing; watch the mean of `reverse_kls`.

    Rows are the responses' tokens, response after response; `lengths` [Y] of them. R is 0 at a response's last token.

    The paper bounds the weights by sampling from a mixture with the teacher, α = 0.2, so that ρ ≤ 1/(1 - α) = 1.25,
    and clips the long part as PPO does. Stored responses are the student's alone: ρ has no bound, hence the 1 + ε in
    both parts. The authors' code gives the single-step part the weight 1, counts t itself into R, clips by R's sign,
    and scales and whitens R over the batch; none of that is in the paper's equations, nor here.
    """
    ratios = importance_weights(student_logps, behavior_logps, clip)
    returns = _mean_of_later((teacher_logps - student_logps).detach(), lengths)
    return ratios.detach() * reverse_kls - returns * ratios


# --- Both responses of a pair, token by token: [N, K] to [B]. `lengths` [2B] are those of y_t, y_s, y_t, y_s, … ---


def gkd_loss(
    student_top_logps: Tensor, teacher_top_logps: Tensor, lengths: Tensor, jsd_beta: float, student_share: float
) -> Tensor:
    """GKD (arXiv 2306.13649) on stored responses: (1 - λ) D(y_t) + λ D(y_s), λ = `student_share`.

    D is the mean of `jensen_shannon` over the tokens of a response. The paper draws for each batch, with probability λ,
    responses that the student samples at that moment, and passes no gradient through the sampling; so does this,
    but its y_s are of the student that sampled them.
    """
    return _of_both(jensen_shannon(student_top_logps, teacher_top_logps, jsd_beta), lengths, student_share)


def skew_kl_loss(
    student_top_logps: Tensor, teacher_top_logps: Tensor, lengths: Tensor, skew_alpha: float, student_share: float
) -> Tensor:
    """DistiLLM (arXiv 2402.03898) with `skew_kl`: (1 - λ) D(y_t) + λ D(y_s), means over the tokens of a response.

    The paper takes responses of the student with a probability that rises with the validation loss, from a buffer of
    earlier ones that it replays. Here the buffer is the dataset, and λ = `student_share` is fixed.
    """
    return _of_both(skew_kl(student_top_logps, teacher_top_logps, skew_alpha), lengths, student_share)


def skew_reverse_kl_loss(
    student_top_logps: Tensor, teacher_top_logps: Tensor, lengths: Tensor, skew_alpha: float, student_share: float
) -> Tensor:
    """As `skew_kl_loss`, with `skew_reverse_kl`."""
    return _of_both(skew_reverse_kl(student_top_logps, teacher_top_logps, skew_alpha), lengths, student_share)


def distillm_2_loss(
    student_top_logps: Tensor, teacher_top_logps: Tensor, lengths: Tensor, skew_alpha: float, student_share: float
) -> Tensor:
    """DistiLLM-2 (Ko et al. 2025, arXiv 2503.07067): (1 - λ) skew KL on y_t + λ skew reverse KL on y_s.

    Means over the tokens of a response; λ = `student_share`. The paper starts from λ = 1/2, which its code keeps
    unless told otherwise, and can let λ grow during training and α follow how far the two models are apart on a
    response; both are fixed here. Its y_s are sampled once an epoch: stored ones are what it is made for.
    """
    is_rejected = (torch.arange(len(lengths), device=lengths.device) % 2 == 1).repeat_interleave(
        lengths, output_size=len(student_top_logps)
    )
    divergences = torch.where(
        is_rejected,
        skew_reverse_kl(student_top_logps, teacher_top_logps, skew_alpha),
        skew_kl(student_top_logps, teacher_top_logps, skew_alpha),
    )
    return _of_both(divergences, lengths, student_share)


def _rest(top_logps: Tensor) -> Tensor:
    """Log-prob [N] of all tokens but the K of `top_logps` [N, K], at least what rounding can tell from nothing."""
    return (1 - top_logps.exp().sum(-1)).clamp(min=torch.finfo(top_logps.dtype).eps).log()


def _with_rest(top_logps: Tensor) -> Tensor:
    """[N, K] to [N, K + 1]: a distribution over the K tokens and all others as one."""
    return torch.cat((top_logps, _rest(top_logps)[:, None]), dim=-1)


def _kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    """KL of two distributions [N, K] given by their log-probs, over the last axis."""
    return (logps.exp() * (logps - other_logps)).sum(-1)


def _mixture(logps: Tensor, other_logps: Tensor, weight: float) -> Tensor:
    """Log-probs of weight · P + (1 - weight) · Q, for P and Q by their log-probs; 0 <= weight < 1."""
    if weight == 0:
        return other_logps
    return torch.logaddexp(logps + math.log(weight), other_logps + math.log1p(-weight))


def _of_both(values: Tensor, lengths: Tensor, student_share: float) -> Tensor:
    """[N] to [B]: the means of `values` over y_t and over y_s, of which the latter counts `student_share`."""
    owners = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(values))
    means = values.new_zeros(len(lengths)).index_add(0, owners, values) / lengths
    return (1 - student_share) * means[0::2] + student_share * means[1::2]


def _mean_of_later(values: Tensor, lengths: Tensor) -> Tensor:
    """For each token the mean of `values` [N] over the later tokens of its response; 0 for the last one."""
    ends = lengths.cumsum(0).repeat_interleave(lengths, output_size=len(values))  # [N], where its response ends
    later = ends - 1 - torch.arange(len(values), device=values.device)
    sums = values.double().cumsum(0)  # over all responses: float32 would lose the short ones
    return ((sums[ends - 1] - sums) / later.clamp(min=1)).to(values.dtype)
