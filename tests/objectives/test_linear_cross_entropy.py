"""The chunked head and loss against a dense float64 one, and its promises: memory, autocast, one backward."""

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nanochat.objectives.linear_cross_entropy  # noqa: F401
from nanochat.objectives import IGNORED, linear_cross_entropy
from nanochat.objectives.linear_cross_entropy import HeadGradient

# the package gives the function under the module's name
loss_module = sys.modules["nanochat.objectives.linear_cross_entropy"]

OPTIONS = [
    {},
    {"softcap": 2.0},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.02},
]


def inputs(batch=3, length=14, dim=8, vocabulary=29, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, dim, generator=generator)
    weight = torch.randn(vocabulary, dim, generator=generator)
    targets = torch.randint(vocabulary, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < ignored] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def dense(
    hidden, weight, targets, kept=None, row_weights=None, divisor=None, *, softcap=0.0, label_smoothing=0.0, z_loss=0.0
):
    """The definition in float64: (loss, per-token losses, gradients of hidden and weight)."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    losses = F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    losses = losses + z_loss * logits.logsumexp(-1).square().flatten()
    mask = (targets != IGNORED).double()
    if kept is not None:
        mask = mask * torch.zeros_like(mask).scatter_(1, kept, 1.0)
    divisor = mask.sum().clamp_min(1) if divisor is None else divisor
    if row_weights is not None:
        mask = mask * row_weights
    loss = (losses * mask.flatten()).sum() / divisor
    loss.backward()
    return loss.detach(), plain.view_as(targets).detach(), h.grad, w.grad


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


class TopLoss:
    """Keeps the highest scores of each sequence."""

    def __init__(self, count):
        self.count = count

    def __call__(self, scores):
        self.scores = scores
        return scores.topk(self.count, dim=1).indices.sort(dim=1).values


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000, None])
def test_loss_and_gradients_against_the_definition(options, chunk):
    hidden, weight, targets = inputs()
    result = linear_cross_entropy(hidden, weight, targets, chunk=chunk, **options)
    (3.0 * result.loss).backward()
    loss, per_token, grad_hidden, grad_weight = dense(hidden, weight, targets, **options)
    assert relative(result.loss.detach(), loss) <= 1e-5
    assert relative(result.per_token, per_token) <= 1e-5
    assert relative(hidden.grad, 3 * grad_hidden) <= 1e-5
    assert relative(weight.grad, 3 * grad_weight) <= 1e-5
    assert result.kept is None
    assert not result.per_token.requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [1, 28, None])
def test_selector_is_the_dense_masked_loss(options, chunk):
    hidden, weight, targets = inputs()
    selector = TopLoss(5)
    result = linear_cross_entropy(hidden, weight, targets, selector=selector, chunk=chunk, **options)
    result.loss.backward()
    _, plain, _, _ = dense(hidden, weight, targets, **options)
    expected_kept = plain.masked_fill(targets == IGNORED, -torch.inf).topk(5, 1).indices.sort(1).values
    assert torch.equal(result.kept, expected_kept)
    loss, per_token, grad_hidden, grad_weight = dense(hidden, weight, targets, expected_kept, **options)
    assert relative(result.loss.detach(), loss) <= 1e-5
    assert relative(result.per_token, per_token) <= 1e-5
    assert relative(hidden.grad, grad_hidden) <= 1e-5
    assert relative(weight.grad, grad_weight) <= 1e-5
    dropped = torch.ones_like(targets, dtype=torch.bool).scatter_(1, expected_kept, False)
    assert not hidden.grad[dropped].any()
    assert (selector.scores[-1, targets[-1] == IGNORED] == -torch.inf).all()


def agrees(result, hidden, weight, expected):
    """The loss, the plain losses and both gradients, to 1e-5."""
    loss, per_token, grad_hidden, grad_weight = expected
    assert relative(result.loss.detach(), loss) <= 1e-5
    assert relative(result.per_token, per_token) <= 1e-5
    assert relative(hidden.grad, grad_hidden) <= 1e-5
    assert relative(weight.grad, grad_weight) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("block", [1, 60, 10**6])
def test_any_block_of_exponentials_in_either_layout(block, by_columns, options, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_COLUMN_MAJOR", 1 if by_columns else 10**9)
    monkeypatch.setattr(loss_module, "CPU_BLOCK", block)
    hidden, weight, targets = inputs()
    result = linear_cross_entropy(hidden, weight, targets, chunk=16, **options)
    result.loss.backward()
    agrees(result, hidden, weight, dense(hidden, weight, targets, **options))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch >= 2.13")
def test_against_torchs_own():
    hidden, weight, targets = inputs(dim=32, vocabulary=301)
    linear_cross_entropy(hidden, weight, targets, chunk=16).loss.backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    F.linear_cross_entropy(h.flatten(0, 1), w, targets.flatten(), ignore_index=IGNORED).backward()
    assert relative(hidden.grad, h.grad) <= 1e-5
    assert relative(weight.grad, w.grad) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("select", [False, True])
def test_row_weights_scale_the_losses_under_the_same_divisor(select, options):
    hidden, weight, targets = inputs()
    row_weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(5)) * 3
    selector = TopLoss(5) if select else None
    result = linear_cross_entropy(
        hidden, weight, targets, selector=selector, row_weights=row_weights, chunk=14, **options
    )
    result.loss.backward()
    agrees(result, hidden, weight, dense(hidden, weight, targets, result.kept, row_weights, **options))


@pytest.mark.parametrize("chunk", [14, 42])
def test_a_selectors_weights_go_with_the_number_of_all_targets(chunk):
    hidden, weight, targets = inputs()
    positions = torch.tensor([[0, 3, 5], [1, 2, 13], [4, 9, 10]])
    given = torch.tensor([[1.0, 0.5, 2.0], [3.0, 1.5, 1.0], [0.0, 4.0, 1.0]])
    parts = iter(zip(positions.split(chunk // 14), given.split(chunk // 14), strict=True))
    result = linear_cross_entropy(hidden, weight, targets, selector=lambda scores: next(parts), chunk=chunk)
    result.loss.backward()
    spread = torch.zeros(targets.shape).scatter_(1, positions, given)
    divisor = (targets != IGNORED).sum()
    agrees(result, hidden, weight, dense(hidden, weight, targets, positions, spread, divisor))


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_selector_may_choose_by_the_norm_of_the_gradient(by_columns, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_COLUMN_MAJOR", 1 if by_columns else 10**9)
    monkeypatch.setattr(loss_module, "CPU_BLOCK", 60)
    hidden, weight, targets = inputs()
    selector = TopLoss(5)
    selector.by_gradient = True
    linear_cross_entropy(hidden, weight, targets, selector=selector, softcap=3.0, chunk=42)
    logits = 3.0 * torch.tanh((hidden.detach().double() @ weight.detach().double().T) / 3.0)
    norms = (logits.softmax(-1) - F.one_hot(targets.clamp_min(0), 29)).norm(dim=-1)
    valid = targets != IGNORED
    assert torch.allclose(selector.scores[valid].double(), norms[valid], rtol=1e-5)
    assert (selector.scores[~valid] == -torch.inf).all()


def test_a_confident_prediction_keeps_the_digits_of_its_gradient_in_bf16():
    """softmax - 1 of the target is about -3e-4: a probability rounded to bfloat16 would make it 0."""
    weight = torch.tensor([[8.0], [0.0]], requires_grad=True)
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, torch.zeros(1, 1, dtype=torch.long)).loss.backward()
    expected = torch.tensor(8.0).neg().exp() / (1 + torch.tensor(8.0).neg().exp())
    assert weight.grad[0].item() == pytest.approx(-expected.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "size"),
    [(50257, torch.float32, 256), (50257, torch.bfloat16, 128), (4096, torch.bfloat16, 256)],
)
def test_tokens_of_a_chunk_on_a_cpu(vocabulary, dtype, size):
    assert loss_module.chunk_size(vocabulary, torch.device("cpu"), dtype) == size


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_rows_are_packed_in_place(by_columns, block, monkeypatch):
    monkeypatch.setattr(loss_module, "KEEP_BLOCK", block)
    x = torch.arange(12.0 * 7).view(12, 7)
    x = x.t().contiguous().t() if by_columns else x
    index = torch.tensor([0, 1, 3, 4, 8, 11])
    expected = x[index]
    packed = loss_module._keep_in_place(x, index)
    assert torch.equal(packed, expected)
    assert packed.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("by_columns", [False, True])
def test_selector_with_either_layout_of_the_logits(by_columns, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_COLUMN_MAJOR", 1 if by_columns else 10**9)
    monkeypatch.setattr(loss_module, "KEEP_BLOCK", 40)
    hidden, weight, targets = inputs()
    result = linear_cross_entropy(hidden, weight, targets, selector=TopLoss(5), softcap=3.0)
    result.loss.backward()
    loss, _, grad_hidden, grad_weight = dense(hidden, weight, targets, result.kept, softcap=3.0)
    assert relative(result.loss.detach(), loss) <= 1e-5
    assert relative(hidden.grad, grad_hidden) <= 1e-5
    assert relative(weight.grad, grad_weight) <= 1e-5


def test_kept_but_ignored_targets_do_not_count():
    hidden, weight, targets = inputs(batch=2, ignored=0.0)
    targets[0, 2:] = IGNORED  # fewer valid targets than kept rows
    result = linear_cross_entropy(hidden, weight, targets, selector=TopLoss(6))
    result.loss.backward()
    loss, _, grad_hidden, grad_weight = dense(hidden, weight, targets, result.kept)
    assert relative(result.loss.detach(), loss) <= 1e-5
    assert relative(hidden.grad, grad_hidden) <= 1e-5
    assert relative(weight.grad, grad_weight) <= 1e-5


@pytest.mark.parametrize("selector", [None, TopLoss(3)])
def test_all_targets_ignored_is_zero_with_zero_gradients(selector):
    hidden, weight, _ = inputs()
    targets = torch.full((3, 14), IGNORED)
    result = linear_cross_entropy(hidden, weight, targets, selector=selector, z_loss=0.1, label_smoothing=0.1)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert not result.per_token.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize(("need_hidden", "need_weight"), [(True, False), (False, True)])
def test_only_the_gradient_that_is_needed(need_hidden, need_weight):
    hidden, weight, targets = inputs()
    hidden.requires_grad_(need_hidden)
    weight.requires_grad_(need_weight)
    linear_cross_entropy(hidden, weight, targets).loss.backward()
    _, _, grad_hidden, grad_weight = dense(hidden, weight, targets)
    for tensor, needed, expected in ((hidden, need_hidden, grad_hidden), (weight, need_weight, grad_weight)):
        assert (tensor.grad is not None) == needed
        if needed:
            assert relative(tensor.grad, expected) <= 1e-5


def test_without_gradients():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        result = linear_cross_entropy(hidden, weight, targets)
    assert relative(result.loss, dense(hidden, weight, targets)[0]) <= 1e-5


def test_large_logits_stay_finite():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden.mul_(1e3)
    result = linear_cross_entropy(hidden, weight, targets)
    result.loss.backward()
    loss, _, grad_hidden, _ = dense(hidden, weight, targets)
    assert relative(result.loss.detach(), loss) <= 1e-5
    assert relative(hidden.grad, grad_hidden) <= 1e-5


@pytest.mark.parametrize("selector", [None, TopLoss(9)])
def test_bf16_autocast(selector):
    hidden, weight, targets = inputs(dim=64, vocabulary=301)
    with torch.no_grad():
        weight.mul_(0.2)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_cross_entropy(hidden, weight, targets, selector=selector, chunk=14)
    result.loss.backward()
    assert result.loss.dtype == result.per_token.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    loss, _, grad_hidden, grad_weight = dense(hidden, weight, targets, result.kept)
    assert relative(result.loss.detach(), loss) <= 2e-3
    assert relative(hidden.grad, grad_hidden) <= 1e-2
    assert relative(weight.grad, grad_weight) <= 1e-2


def test_bf16_weight_gradient_is_accumulated_in_float32():
    # 512 equal contributions: a bfloat16 running sum would stop growing half-way
    hidden = torch.ones(1, 512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(1, 512, dtype=torch.long), chunk=1).loss.backward()
    assert weight.grad[:, 0].tolist() == [-0.5, 0.5]


def test_a_product_in_bf16_is_added_by_blocks_of_rows(monkeypatch):
    a, b = torch.randn(1001, 16).bfloat16(), torch.randn(16, 32).bfloat16()
    found = []
    for rows in (2000, 64):
        monkeypatch.setattr(loss_module, "GRADIENT_BLOCK", rows * 32)
        total = torch.ones(1001, 32)
        with LiveBytes() as live:
            loss_module._add_product(total, a, b)
        found.append((total, live.peak))
    assert torch.equal(found[0][0], found[1][0])
    assert relative(found[1][0], 1.0 + a.double() @ b.double()) <= 1e-2
    assert found[0][1] - found[1][1] >= 2 * 32 * (1001 - 2 * 64), "whole, it takes half of the gradient's memory"


def test_a_second_backward_raises():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once in tensors made inside the block."""

    def __init__(self):
        super().__init__()
        self.tensors, self.peak = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.tensors += [
            weakref.ref(t) for t in (out if isinstance(out, (tuple, list)) else (out,)) if hasattr(t, "data_ptr")
        ]
        self.tensors = [ref for ref in self.tensors if ref() is not None]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for ref in self.tensors
            if (t := ref()) is not None
        }
        self.peak = max(self.peak, sum(storages.values()))
        return out


@pytest.mark.parametrize("selector", [None, TopLoss(3)])
def test_peak_memory_does_not_grow_with_the_tokens(selector):
    vocabulary, dim, length = 4000, 4, 8
    peaks = []
    for batch in (2, 40):
        hidden, weight, targets = inputs(batch, length, dim, vocabulary)
        with LiveBytes() as live:
            linear_cross_entropy(hidden, weight, targets, selector=selector, chunk=length).loss.backward()
        per_token_tensors = 4 * batch * length * (dim + 8)
        peaks.append(live.peak - per_token_tensors)
        logits_of_all = 4 * batch * length * vocabulary
    assert abs(peaks[1] - peaks[0]) < 0.1 * peaks[0]
    assert peaks[1] < 0.2 * logits_of_all


def shared_terms(share, selector=None, factors=(1.0, 1.0, 1.0)):
    """(terms, hiddens, weight) of three calls on one output matrix; the second's coefficient is a tensor."""
    hiddens, targets = zip(*(inputs(length=length, seed=length)[::2] for length in (14, 5, 9)), strict=True)
    weight = inputs(seed=7)[1]
    head = HeadGradient() if share else None
    given = ({"selector": selector}, {"coefficient": torch.tensor(0.3)}, {"coefficient": 0.05, "z_loss": 0.01})
    terms = [
        factor * linear_cross_entropy(h, weight, t, softcap=4.0, chunk=14, head=head, **options).loss
        for h, t, options, factor in zip(hiddens, targets, given, factors, strict=True)
    ]
    return terms, hiddens, targets, weight, head


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("times", [1.0, 0.25])
def test_terms_that_share_the_matrix_gradient(select, times):
    terms, hiddens, targets, weight, head = shared_terms(True, TopLoss(5) if select else None)
    memory = head.buffer.data_ptr()
    (times * torch.stack(terms).sum()).backward()
    kept = None
    if select:
        plain = dense(hiddens[0], weight, targets[0], softcap=4.0)[1]
        kept = plain.masked_fill(targets[0] == IGNORED, -torch.inf).topk(5, 1).indices.sort(1).values
    expected = [
        dense(hiddens[0], weight, targets[0], kept, softcap=4.0),
        dense(hiddens[1], weight, targets[1], softcap=4.0),
        dense(hiddens[2], weight, targets[2], softcap=4.0, z_loss=0.01),
    ]
    factors = (1.0, 0.3, 0.05)
    for term, factor, (loss, *_) in zip(terms, factors, expected, strict=True):
        assert term.item() == pytest.approx(factor * loss.item(), rel=1e-5)
    for hidden, factor, (*_, grad_hidden, _) in zip(hiddens, factors, expected, strict=True):
        assert relative(hidden.grad, times * factor * grad_hidden) <= 1e-5
    total = sum(factor * entry[-1] for factor, entry in zip(factors, expected, strict=True))
    assert relative(weight.grad, times * total) <= 1e-5
    assert weight.grad.data_ptr() == memory  # the only one there was


def test_shared_terms_must_be_summed_as_they_are():
    terms, *_ = shared_terms(True, factors=(1.0, 2.0, 1.0))
    with pytest.raises(RuntimeError, match="without further factors"):
        torch.stack(terms).sum().backward()
    terms, *_ = shared_terms(True)
    with pytest.raises(RuntimeError, match="missing in the loss"):
        (terms[0] + terms[2]).backward()
    terms, *_ = shared_terms(False, factors=(1.0, 2.0, 1.0))
    torch.stack(terms).sum().backward()


def test_a_first_term_with_a_coefficient_does_not_share():
    hidden, weight, targets = inputs()
    head = HeadGradient()
    for coefficient in (0.5, torch.tensor(2.0)):
        linear_cross_entropy(hidden, weight, targets, head=head, coefficient=coefficient).loss.backward()
        assert head.buffer is None
    _, _, grad_hidden, grad_weight = dense(hidden, weight, targets)
    assert relative(hidden.grad, 2.5 * grad_hidden) <= 1e-5
    assert relative(weight.grad, 2.5 * grad_weight) <= 1e-5


def test_sharing_without_gradients():
    hidden, weight, targets = inputs()
    head = HeadGradient()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, head=head).loss > 0
    assert head.buffer is None
    linear_cross_entropy(hidden, weight.detach(), targets, head=head).loss.backward()  # a frozen matrix
    assert head.buffer is None
    assert weight.grad is None


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_validation_multiplies_once(quiet):
    """Without gradients there is one product, that of the logits."""
    hidden, weight, targets = inputs()
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("aten::mm", "aten::addmm_", "aten::addmm"):
                seen.append(func)
            return func(*args, **(kwargs or {}))

    with quiet(), Products():
        linear_cross_entropy(hidden, weight, targets)
    assert len(seen) == 1
    with Products():
        linear_cross_entropy(hidden, weight, targets)
    assert len(seen) == 1 + 3


@pytest.mark.parametrize("quiet", [True, False])
def test_a_call_without_a_gradient_of_its_own_adds_nothing(quiet):
    """Between a step's terms: under no_grad, or of hidden states that nothing has to learn from."""
    hidden, weight, targets = inputs()
    head = HeadGradient()
    first = linear_cross_entropy(hidden, weight, targets, head=head).loss
    with torch.set_grad_enabled(not quiet):
        linear_cross_entropy(hidden.detach() * 2, weight, targets, head=head, coefficient=0.5)
    first.backward()
    assert relative(weight.grad, dense(hidden, weight, targets)[-1]) <= 1e-5
