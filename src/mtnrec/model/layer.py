"""The layers that the networks share, and label probabilities in log space."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnrec.batch import Bags, Batch, LogProbabilities
from mtnrec.checks import (
    InputError,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    name_some,
)
from mtnrec.schema import Schema

_WIDEST_RUN = 32  # columns; beyond, the zeros beside the diagonal cost more than a product


class FeatureInput(nn.Module):
    """The features of a batch, one dense row each, as MTReclib lays them out.

    Every categorical field looks up a ``D``-wide vector, every multi-valued field sums or averages
    the vectors of its tokens with their weights (an empty bag gives zeros), and all numerical
    features pass through one linear map to one more. The vectors side by side are the row.

    Args:
        schema: The fields.
        embedding_dim: ``D``; one for all, or one for each field that it names and, for the other
            fields and the numerical features, a ``default``.
        bag_mode: ``mean``, the weighted mean of the tokens' vectors, or ``sum``.
        embedding_init: Xavier's uniform distribution for the vectors, with bounds as for ``joint``,
            one table of all fields (``sqrt(6 / (N + D))``, ``N`` the values of all fields), as in
            MTReclib, whose settings the paper uses; or ``per_field``, a table for each
            (``sqrt(6 / (N_f + D))``), where the vectors of a field of few values start up to a
            hundred times larger.

    Row 0 of each table, which stands for missing and unseen values, starts at zero: it is rare in
    training or does not occur at all, so a random start would add noise to every row that has it.
    MTReclib has no such row.
    """

    def __init__(
        self,
        schema: Schema,
        embedding_dim: int | Mapping[Any, int],
        bag_mode: str,
        embedding_init: str = "joint",
    ) -> None:
        super().__init__()
        widths, default = _widths(schema, embedding_dim)
        check_choice("model.bag_mode", bag_mode, ["mean", "sum"])
        check_choice("model.embedding_init", embedding_init, ["joint", "per_field"])
        if not schema.categorical and not schema.multivalued and not schema.numerical:
            raise InputError("the data set has no features: a model needs at least one")
        self.tables, self.bag_tables = (
            nn.ModuleList(nn.Embedding(f.vocabulary_size, widths[f.name]) for f in fields)
            for fields in (schema.categorical, schema.multivalued)
        )
        self._bag_mode = bag_mode
        tables = [*_embeddings(self.tables), *_embeddings(self.bag_tables)]
        values = sum(table.num_embeddings for table in tables)
        for table in tables:
            rows = values if embedding_init == "joint" else table.num_embeddings
            bound = math.sqrt(6 / (rows + table.embedding_dim))
            nn.init.uniform_(table.weight, -bound, bound)
            with torch.no_grad():
                table.weight[0] = 0
        self.numerical = nn.Linear(len(schema.numerical), default) if schema.numerical else None
        self._widths = [table.embedding_dim for table in tables]
        if self.numerical is not None:
            self._widths.append(default)
        self.out_features = sum(self._widths)
        # A one-hot vector no wider than the embedding makes a product no dearer.
        sizes = [field.vocabulary_size for field in schema.categorical]
        self._small = [i for i, size in enumerate(sizes) if size <= self._widths[i]]
        self._large = [i for i, size in enumerate(sizes) if size > self._widths[i]]
        # Where the columns of a layer meet the small fields, the large ones, bags and numericals.
        ends = list(itertools.accumulate(self._widths, initial=0))
        blocks = [slice(start, end) for start, end in itertools.pairwise(ends)]
        self._joined = _join(self._small, sizes)
        joined = [slice(blocks[run[0]].start, blocks[run[-1]].stop) for run in self._joined]
        self._blocks = [*joined, *(blocks[i] for i in self._large), *blocks[len(sizes) :]]
        starts = list(itertools.accumulate((sizes[field] for field in self._small), initial=0))
        self._one_hot_width = starts.pop()
        self.register_buffer("_one_hot_starts", torch.tensor(starts), persistent=False)
        small = torch.tensor(self._small, dtype=torch.int64)
        self.register_buffer("_small_fields", small, persistent=False)

    def make_gradients(self, *, sparse: bool) -> None:
        """Choose sparse or dense gradients for the tables whose rows are looked up.

        They are those with more rows than columns, and those of multi-valued fields. A sparse
        gradient holds the rows that the batch has; not every optimiser takes one.
        """
        large = [_embeddings(self.tables)[field] for field in self._large]
        for table in [*large, *_embeddings(self.bag_tables)]:
            table.sparse = sparse

    def forward(self, batch: Batch) -> Tensor:
        """Return the rows, ``(B, (F + M + 1) * D)``, and one ``D`` less without numericals."""
        columns = batch.categorical.unbind(dim=1)
        tables = _embeddings(self.tables)
        vectors = [table(column) for table, column in zip(tables, columns, strict=True)]
        vectors += self._bag_vectors(batch)
        if self.numerical is not None:
            vectors.append(self.numerical(batch.numerical))
        return torch.cat(vectors, dim=1)

    def feed(self, batch: Batch, *groups: Sequence[nn.Linear]) -> list[Tensor]:
        """Return ``layer(self(batch))`` for each layer, without making the wide rows.

        With ``E_f`` the table of a field and ``W_f`` the columns of a layer that it meets, the
        field's share of the output is ``onehot @ (E_f W_f^T)``. For a small vocabulary that product
        is far narrower than ``D`` columns, and its table is made once a batch. Likewise the map of
        the numerical features folds into the layer. Fields with a large vocabulary look up their
        vectors as usual. All shares are one matrix product; parameters, function and gradients are
        those of the wide rows up to rounding. An export makes the wide rows: of one row at a time,
        which is how models are served, folding would be most of the work.

        Args:
            batch: ``B`` rows.
            groups: Linear layers alike, with ``out_features`` of this module as their inputs.

        Returns:
            The outputs of each group of ``E`` layers, ``(E, B, O)``.
        """
        if torch.compiler.is_exporting():
            rows = self(batch)
            return [torch.stack([layer(rows) for layer in layers]) for layers in groups]
        columns = self._columns(batch)
        return [
            torch.bmm(columns.expand(len(layers), -1, -1), self._fold(layers).transpose(1, 2))
            for layers in groups
        ]

    def feed_one(self, batch: Batch, layer: nn.Linear) -> Tensor:
        """Return ``layer(self(batch))``, ``(B, O)``, as :meth:`feed` does."""
        if torch.compiler.is_exporting():
            return layer(self(batch))
        return self._columns(batch) @ self._fold([layer])[0].T

    def _columns(self, batch: Batch) -> Tensor:
        """Return what the folded layers are applied to, ``(B, C)``; the last column is ones."""
        columns = [self._one_hot(batch)] if self._small else []
        columns += [self._table(field)(batch.categorical[:, field]) for field in self._large]
        columns += self._bag_vectors(batch)
        if self.numerical is not None:
            columns.append(batch.numerical)
        # For the bias: as one more column it costs neither a pass over the outputs nor one over
        # their gradients.
        columns.append(columns[0].new_ones(len(batch), 1))
        return torch.cat(columns, dim=1)

    def _fold(self, layers: Sequence[nn.Linear]) -> Tensor:
        """Return the layers for :meth:`_columns`, ``(E, O, C)``."""
        maps: list[Tensor | None] = [
            torch.block_diag(*(self._table(field).weight.T for field in run))
            for run in self._joined
        ]
        maps += [None] * (len(self._large) + len(self.bag_tables))
        if self.numerical is not None:
            maps.append(torch.cat([self.numerical.weight, self.numerical.bias[:, None]], dim=1))
        weights = [layer.weight for layer in layers]
        if weights[0].device.type != "cpu":  # many small products would wait for their start
            weights = [torch.cat(weights)]
        folded: Tensor = BlockProducts.apply(  # type: ignore[no-untyped-call]
            self._blocks, len(weights), *weights, *maps
        )
        folded = folded.view(len(layers), -1, folded.shape[2])
        bias = torch.stack([layer.bias for layer in layers]).unsqueeze(2)
        if self.numerical is not None:
            folded, of_numerical = folded.split([folded.shape[2] - 1, 1], dim=2)
            bias = bias + of_numerical
        return torch.cat([folded, bias], dim=2)

    def _table(self, field: int) -> nn.Embedding:
        return _embeddings(self.tables)[field]

    def _one_hot(self, batch: Batch) -> Tensor:
        """Return the small fields as ones among zeros, ``(B, sum of their vocabularies)``."""
        small = batch.categorical.index_select(1, self.get_buffer("_small_fields"))
        positions = small + self.get_buffer("_one_hot_starts")
        dtype = _embeddings(self.tables)[0].weight.dtype
        zeros = torch.zeros(len(batch), self._one_hot_width, dtype=dtype, device=positions.device)
        return zeros.scatter_(1, positions, 1)

    def _bag_vectors(self, batch: Batch) -> list[Tensor]:
        """Return a vector ``(B, D)`` for each multi-valued field."""
        return [
            self._bag_vector(table, bags)
            for table, bags in zip(_embeddings(self.bag_tables), batch.bags, strict=True)
        ]

    def _bag_vector(self, table: nn.Embedding, bags: Bags) -> Tensor:
        if bags.tokens.dim() == 2:
            return self._padded_bag_vector(table, bags)
        weights = bags.weights
        if self._bag_mode == "mean":
            lengths = bags.offsets.diff()
            row = torch.repeat_interleave(lengths)
            totals = weights.new_zeros(len(lengths)).index_add(0, row, weights)
            # Where all weights are zero the sum is zero too, whatever it is divided by.
            weights = weights / totals.where(totals != 0, 1)[row]
        tokens, vectors = bags.tokens, table.weight
        if table.sparse and torch.is_grad_enabled():
            # A row of gradient for each token would take more than a dense gradient does.
            present, tokens = tokens.unique(return_inverse=True)
            vectors = table(present)
        return F.embedding_bag(
            tokens,
            vectors,
            bags.offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )

    def _padded_bag_vector(self, table: nn.Embedding, bags: Bags) -> Tensor:
        weights = bags.weights
        if self._bag_mode == "mean":
            totals = weights.sum(dim=1, keepdim=True)
            weights = weights / totals.where(totals != 0, 1)
        return (table(bags.tokens) * weights.unsqueeze(2)).sum(dim=1)


class BlockProducts(torch.autograd.Function):
    """``W[:, block] @ M`` for each of ``E`` matrices alike and each block of their columns.

    All products and the gradient of each ``W`` are written once and in place: the first layers of
    MMoE's experts are the largest tensors of a step, and to join them, cut them and join their
    gradients took a fifth of it.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Sequence[slice], count: int, *tensors: Any) -> Tensor:
        """Return the products, ``(E, O, sum of the columns of M)``.

        Args:
            ctx: Of autograd.
            blocks: Columns of ``W`` that each ``M`` meets.
            count: ``E``.
            tensors: ``E`` matrices ``W``, ``(O, I)``, and an ``M`` for each block; None is the
                identity.
        """
        weights, maps = tensors[:count], tensors[count:]
        ctx.save_for_backward(*tensors)
        widths = [
            block.stop - block.start if matrix is None else matrix.shape[1]
            for block, matrix in zip(blocks, maps, strict=True)
        ]
        ctx.blocks, ctx.count, ctx.widths = blocks, count, widths
        outputs: Tensor = weights[0].new_empty(count, len(weights[0]), sum(widths))
        for weight, output in zip(weights, outputs, strict=True):
            for block, matrix, part in zip(blocks, maps, output.split(widths, 1), strict=True):
                if matrix is None:
                    part.copy_(weight[:, block])
                else:
                    torch.mm(weight[:, block], matrix, out=part)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of each ``W`` and ``M`` that needs one."""
        weights, maps = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needed = ctx.needs_input_grad[2:]
        of_weights = [
            torch.empty_like(w) if n else None
            for w, n in zip(weights, needed[: ctx.count], strict=True)
        ]
        # Transposed, since a product with few columns takes twice as long as one with few rows.
        of_maps = [
            m.new_zeros(m.shape[::-1]).T if n else None
            for m, n in zip(maps, needed[ctx.count :], strict=True)
        ]
        for weight, gradient, of_weight in zip(weights, gradients[0], of_weights, strict=True):
            parts = gradient.split(ctx.widths, 1)
            for block, matrix, part, of_map in zip(ctx.blocks, maps, parts, of_maps, strict=True):
                if of_weight is not None and matrix is None:
                    of_weight[:, block] = part
                elif of_weight is not None:
                    torch.mm(part, matrix.T, out=of_weight[:, block])
                if of_map is not None:
                    of_map.T.addmm_(part.T, weight[:, block])
        return (None, None, *of_weights, *of_maps)


def _widths(schema: Schema, embedding_dim: int | Mapping[Any, int]) -> tuple[dict[str, int], int]:
    """Return the width of the vectors of each field, and that of what no key names."""
    names = [field.name for field in (*schema.categorical, *schema.multivalued)]
    if not isinstance(embedding_dim, Mapping):
        check_integer("model.embedding_dim", embedding_dim, minimum=1)
        return dict.fromkeys(names, embedding_dim), embedding_dim
    # YAML reads the names 101 and 109_14 as the numbers 101 and 10914.
    by_number = {name.replace("_", ""): name for name in names if name[:1].isdigit()}
    widths = {
        str(key) if str(key) in names else by_number.get(str(key), str(key)): width
        for key, width in embedding_dim.items()
    }
    for name, width in widths.items():
        check_integer(f"model.embedding_dim.{name}", width, minimum=1)
    if "default" not in widths:
        raise InputError(
            "model.embedding_dim needs a default for what it does not name, as in "
            f"{{default: 128, 101: 16}}; got {widths}"
        )
    default = widths.pop("default")
    if unknown := [name for name in widths if name not in names]:
        raise InputError(
            f"model.embedding_dim names {name_some(unknown)}; the fields of the data are "
            f"{', '.join(names) or 'none'}"
        )
    return dict.fromkeys(names, default) | widths, default


def _join(fields: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut fields into runs of neighbours whose vocabularies are small together.

    One product with the tables of a run along a diagonal takes less time than a product for each,
    whose matrices are a few columns wide.
    """
    runs: list[list[int]] = []
    for field in fields:
        run = runs[-1] if runs else []
        is_next = run and field == run[-1] + 1
        if is_next and sum(sizes[i] for i in (*run, field)) <= _WIDEST_RUN:
            run.append(field)
        else:
            runs.append([field])
    return runs


def _embeddings(tables: nn.ModuleList) -> list[nn.Embedding]:
    return [table for table in tables if isinstance(table, nn.Embedding)]


class MLP(nn.Sequential):
    """Linear, batch norm, ReLU and dropout for each width.

    Args:
        in_features: Columns of the input.
        widths: Outputs of each linear layer.
        dropout: Probability that an output is dropped while training, in [0, 1).
        batch_norm: Whether a batch norm follows each linear layer.
        head: Whether one more linear layer follows, with a single output (a logit).
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        *,
        dropout: float,
        batch_norm: bool,
        head: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        sizes = [in_features, *widths]
        for inputs, outputs in itertools.pairwise(sizes):
            layers.append(nn.Linear(inputs, outputs))
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(nn.ReLU(inplace=True))  # no layer before it needs its output
            if dropout:
                layers.append(nn.Dropout(dropout))
        if head:
            layers.append(nn.Linear(sizes[-1], 1))
        super().__init__(*layers)
        self.out_features = 1 if head else sizes[-1]

    def rest(self, hidden: Tensor) -> Tensor:
        """Apply all that follows the first linear layer to its output."""
        for layer in itertools.islice(self, 1, None):
            hidden = layer(hidden)
        return hidden

    def linear_layers(self) -> list[nn.Linear]:
        """Return the linear layers, from the input on."""
        return [layer for layer in self if isinstance(layer, nn.Linear)]


class ParallelMLPs(nn.ModuleList):
    """MLPs alike that stand side by side, computed together: the towers of the tasks, or experts.

    Their layers of one depth are one batched matrix product; the parameters are those of separate
    MLPs.

    Args:
        count: Number of MLPs.
        in_features: Columns of the input of each.
        widths: Outputs of each linear layer.
        dropout: In [0, 1).
        batch_norm: Whether a batch norm follows each linear layer.
        head: Whether each ends in a logit.
    """

    def __init__(
        self,
        count: int,
        in_features: int,
        widths: Sequence[int],
        *,
        dropout: float,
        batch_norm: bool,
        head: bool = False,
    ) -> None:
        super().__init__(
            MLP(in_features, widths, dropout=dropout, batch_norm=batch_norm, head=head)
            for _ in range(count)
        )

    def mlps(self) -> list[MLP]:
        """Return the MLPs."""
        return [mlp for mlp in self if isinstance(mlp, MLP)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply each MLP to an input of its own, ``(E, B, I)``; returns ``(E, B, O)``."""
        return self._apply_from(0, inputs)

    def rest(self, hidden: Tensor) -> Tensor:
        """Apply what follows the first linear layers to their outputs, ``(E, B, O)``."""
        return self._apply_from(1, hidden)

    def first_layers(self) -> list[nn.Linear]:
        """Return the first linear layer of each."""
        return self.by_depth()[0]

    def _apply_from(self, start: int, hidden: Tensor) -> Tensor:
        mlps = [list(mlp)[start:] for mlp in self.mlps()]
        for alike in zip(*mlps, strict=True):
            hidden = _apply_together(alike, hidden)
        return hidden

    def by_depth(self) -> list[list[nn.Linear]]:
        """Return the linear layers, one list for each depth."""
        return [
            list(depth) for depth in zip(*(mlp.linear_layers() for mlp in self.mlps()), strict=True)
        ]


def _apply_together(alike: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """Apply modules of one kind, each to its own slice of ``(E, B, I)``."""
    if isinstance(alike[0], nn.Linear):
        weights = torch.stack([layer.get_parameter("weight") for layer in alike])
        biases = torch.stack([layer.get_parameter("bias") for layer in alike])
        return _products(hidden, weights, biases)
    if isinstance(alike[0], nn.BatchNorm1d):
        slices = zip(alike, hidden.unbind(), strict=True)
        return torch.stack([norm(part) for norm, part in slices])
    return alike[0](hidden)  # ReLU and dropout act on each element alone


def _products(hidden: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Return the outputs of ``E`` linear layers, ``(E, B, O)``, of inputs ``(E, B, I)``."""
    return torch.baddbmm(biases.unsqueeze(1), hidden, weights.transpose(1, 2))


def check_sizes(*, dropout: float, batch_norm: bool, **widths: Sequence[int]) -> None:
    """Check the keys that all networks have; ``widths`` by the name of their key.

    Raises:
        InputError: If a list of widths is empty, a width is below 1, or ``dropout`` is no
            probability below 1.
    """
    check_number("model.dropout", dropout, minimum=0, maximum=1, open_maximum=True)
    check_flag("model.batch_norm", batch_norm)
    for name, sizes in widths.items():
        if isinstance(sizes, str | int) or not len(sizes):
            raise InputError(f"model.{name} must be a list of at least one width, got {sizes!r}")
        for size in sizes:
            check_integer(f"model.{name}", size, minimum=1)


def label_log_probabilities(logits: Tensor) -> LogProbabilities:
    """Read the logits of the towers, ``(T, B, 1)``, as the log-odds of their own labels."""
    joined = _at_least_float32(logits.squeeze(-1).T)
    return LogProbabilities(_log_sigmoid(joined), _log_sigmoid(-joined))


def funnel_log_probabilities(click_logit: Tensor, conversion_logit: Tensor) -> LogProbabilities:
    """Read two logits ``(B, 1)`` as a funnel: ``P(y) = s(a)``, ``P(z) = s(a) s(b)`` (ESMM).

    At any logit the values have an error of 2 eps at most, and the gradients one of 64.

    >>> click, conversion = torch.tensor([[60.0]]), torch.tensor([[-60.0]])
    >>> funnel_log_probabilities(click, conversion).positive
    tensor([[-8.7565e-27, -6.0000e+01]])
    """
    a, b = map(_at_least_float32, (click_logit, conversion_logit))
    click, no_click = _log_sigmoid(a), _log_sigmoid(-a)
    conversion = click + _log_sigmoid(b)
    # log P(z = 0). Where P(z = 1) is small, log1p; else 1 - s(a) s(b) = s(-a) + s(a) s(-b), which
    # would cancel there. The constant keeps the gradient of the branch not taken finite.
    product = _sigmoid(a) * _sigmoid(b)
    is_small = product < 0.5
    no_conversion = torch.where(
        is_small,
        torch.where(is_small, -product, -0.5).log1p(),
        torch.logaddexp(no_click, click + _log_sigmoid(-b)),
    )
    return LogProbabilities(
        torch.cat([click, conversion], dim=1), torch.cat([no_click, no_conversion], dim=1)
    )


def _sigmoid(logits: Tensor) -> Tensor:
    # The gradient of torch's, s(x) (1 - s(x)), cancels where s(x) is near 1.
    return torch.where(logits > 0, 1 - (-logits).sigmoid(), logits.sigmoid())


def _log_sigmoid(logits: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return -F.softplus(-logits)  # ONNX has it; its logarithm of a sigmoid is -inf below -104
    return F.logsigmoid(logits)


def _at_least_float32(logits: Tensor) -> Tensor:
    # Half-precision logits would round probabilities near 0 and 1 before the loss sees them.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
