"""The input layer: embeddings, bags and numerical features."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnrec.batch import Bags, Batch
from mtnrec.checks import (
    InputError,
    check_choice,
    check_integer,
    find_duplicates,
    format_names,
)
from mtnrec.model.cross import CrossNetwork
from mtnrec.schema import Schema

_MOST_CROSS_LAYERS = 100
_WIDEST_RUN = 32  # columns; beyond, zeros off the diagonal cost more than a product


class BlockPlan(NamedTuple):
    """Assignment of the columns of a first layer to the features.

    Args:
        small: Fields whose one-hot vector is at most as wide as their embedding.
        large: The other fields.
        joined: Runs of adjacent small fields, each run computed as one product.
        blocks: Columns of the layer for each run, each large field, each bag and the numerical
            features, in this order.
        one_hot_starts: First column of each small field's one-hot vector.
        one_hot_width: Total width of the one-hot vectors.
    """

    small: list[int]
    large: list[int]
    joined: list[list[int]]
    blocks: list[slice]
    one_hot_starts: list[int]
    one_hot_width: int


def plan_blocks(sizes: Sequence[int], widths: Sequence[int]) -> BlockPlan:
    """Plan the products of a first layer.

    Args:
        sizes: Vocabulary size of each categorical field.
        widths: Embedding width of each categorical field, then of each bag and of the numerical
            features.

    >>> plan = plan_blocks([3, 100, 4], [8, 8, 8, 8])
    >>> plan.small, plan.large, plan.joined, plan.one_hot_starts, plan.one_hot_width
    ([0, 2], [1], [[0], [2]], [0, 3], 7)
    >>> [(block.start, block.stop) for block in plan.blocks]
    [(0, 8), (16, 24), (8, 16), (24, 32)]
    """
    # The product with a one-hot vector at most as wide as the embedding is at most as expensive.
    small = [field for field, size in enumerate(sizes) if size <= widths[field]]
    large = [field for field, size in enumerate(sizes) if size > widths[field]]
    ends = list(itertools.accumulate(widths, initial=0))
    blocks = [slice(start, end) for start, end in itertools.pairwise(ends)]
    joined = _join(small, sizes)
    run_blocks = [slice(blocks[run[0]].start, blocks[run[-1]].stop) for run in joined]
    starts = list(itertools.accumulate((sizes[field] for field in small), initial=0))
    width = starts.pop()
    ordered = [*run_blocks, *(blocks[field] for field in large), *blocks[len(sizes) :]]
    return BlockPlan(small, large, joined, ordered, starts, width)


class FeatureInput(nn.Module):
    """Dense feature rows of a batch, laid out as in MTReclib.

    Every categorical field looks up a ``D``-wide vector, every multi-valued field sums or averages
    the vectors of its tokens with their weights (an empty bag gives zeros), and one linear map
    turns all numerical features into one more vector. A row is the concatenation of these vectors.

    Args:
        schema: The fields.
        embedding_dim: ``D``: one width for all fields, or a width per named field and a ``default``
            for the other fields and the numerical features.
        bag_mode: ``mean``, the weighted mean of the tokens' vectors, or ``sum``.
        embedding_init: Bounds of Xavier's uniform distribution for the vectors: ``joint``, those of
            one table of all fields (``sqrt(6 / (N + D))``, ``N`` the values of all fields), as in
            MTReclib, whose settings the paper uses; or ``per_field``, those of a table per field
            (``sqrt(6 / (N_f + D))``), so that the vectors of a field with few values start up to a
            hundred times larger.
        cross_layers: Number of layers of a :class:`~mtnrec.model.cross.CrossNetwork` on the rows; 0
            leaves them as they are.
        cross_rank: Rank of its matrices.

    Row 0 of each table, which stands for missing and unseen values, starts at zero: it is rare or
    absent in training, so a random start would add noise to every row that has it.
    MTReclib has no such row.
    """

    def __init__(
        self,
        schema: Schema,
        embedding_dim: int | Mapping[Any, int],
        bag_mode: str,
        embedding_init: str = "joint",
        *,
        cross_layers: int = 0,
        cross_rank: int = 64,
    ) -> None:
        super().__init__()
        widths, default = _widths(schema, embedding_dim)
        check_choice("model.bag_mode", bag_mode, ["mean", "sum"])
        check_choice("model.embedding_init", embedding_init, ["joint", "per_field"])
        check_integer("model.cross_layers", cross_layers, minimum=0, maximum=_MOST_CROSS_LAYERS)
        check_integer("model.cross_rank", cross_rank, minimum=1)
        if not schema.categorical and not schema.multivalued and not schema.numerical:
            raise InputError("the data set must have at least one feature, got none")
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
        self.cross = (
            CrossNetwork(self.out_features, cross_layers, cross_rank) if cross_layers else None
        )
        sizes = [field.vocabulary_size for field in schema.categorical]
        self._plan = plan_blocks(sizes, self._widths)
        starts = torch.tensor(self._plan.one_hot_starts, dtype=torch.int64)
        self.register_buffer("_one_hot_starts", starts, persistent=False)
        small = torch.tensor(self._plan.small, dtype=torch.int64)
        self.register_buffer("_small_fields", small, persistent=False)

    def make_gradients(self, *, sparse: bool) -> None:
        """Choose sparse or dense gradients for the tables whose rows are looked up.

        These are the tables with more rows than columns and those of multi-valued fields. A sparse
        gradient holds only the rows in the batch; not every optimiser supports one.
        """
        large = [_embeddings(self.tables)[field] for field in self._plan.large]
        for table in [*large, *_embeddings(self.bag_tables)]:
            table.sparse = sparse

    def forward(self, batch: Batch) -> Tensor:
        """Return the rows, ``(B, (F + M + 1) * D)``; one ``D`` less without numerical features."""
        rows = torch.cat(self.vectors(batch), dim=1)
        return rows if self.cross is None else self.cross(rows)

    def vectors(self, batch: Batch) -> list[Tensor]:
        """Return the vector of each field and that of the numerical features, ``(B, D)`` each."""
        columns = batch.categorical.unbind(dim=1)
        tables = _embeddings(self.tables)
        vectors = [table(column) for table, column in zip(tables, columns, strict=True)]
        vectors += self._bag_vectors(batch)
        if self.numerical is not None:
            vectors.append(self.numerical(batch.numerical))
        return vectors

    def vector(self, batch: Batch, field: int) -> Tensor:
        """Return the vector of a field, ``(B, D)``; multi-valued fields follow the categorical."""
        if field < len(self.tables):
            return self._table(field)(batch.categorical[:, field])
        bag = field - len(self.tables)
        return self._bag_vector(_embeddings(self.bag_tables)[bag], batch.bags[bag])

    def width(self, field: int) -> int:
        """Return the ``D`` of a field, numbered as in :meth:`vector`."""
        return self._widths[field]

    def first_layers(self, batch: Batch, *groups: Sequence[nn.Linear]) -> list[Tensor]:
        """Return ``layer(self(batch))`` for each layer, without building the wide rows.

        With ``E_f`` the table of a field and ``W_f`` its columns of a layer, the field's share of
        the output is ``onehot @ (E_f W_f^T)``. For a small vocabulary that product is far narrower
        than ``D`` columns, and its table is computed once per batch. Likewise the map of the
        numerical features folds into the layer. Fields with a large vocabulary look up their
        vectors as usual. All shares are one matrix product; parameters, function and gradients
        equal those of the wide rows up to rounding. An exported model builds the wide rows: models
        are served one row at a time, where folding would be most of the work; so does a cross
        network, whose layers multiply the rows elementwise.

        Args:
            batch: ``B`` rows.
            groups: Linear layers of equal shape, whose inputs are this module's outputs.

        Returns:
            The outputs of each group of ``E`` layers, ``(E, B, O)``.
        """
        if torch.compiler.is_exporting() or self.cross is not None:
            rows = self(batch)
            return [torch.stack([layer(rows) for layer in layers]) for layers in groups]
        columns = self._columns(batch)
        return [
            torch.bmm(columns.expand(len(layers), -1, -1), self._fold(layers).transpose(1, 2))
            for layers in groups
        ]

    def first_layer(self, batch: Batch, layer: nn.Linear) -> Tensor:
        """Return ``layer(self(batch))``, ``(B, O)``, computed as in :meth:`first_layers`."""
        if torch.compiler.is_exporting() or self.cross is not None:
            return layer(self(batch))
        return self._columns(batch) @ self._fold([layer])[0].T

    def _columns(self, batch: Batch) -> Tensor:
        """Return the input of the folded layers, ``(B, C)``; the last column is ones."""
        columns = [self._one_hot(batch)] if self._plan.small else []
        columns += [self._table(field)(batch.categorical[:, field]) for field in self._plan.large]
        columns += self._bag_vectors(batch)
        if self.numerical is not None:
            columns.append(batch.numerical)
        # A column for the bias saves a pass over the outputs and one over their gradients.
        columns.append(columns[0].new_ones(len(batch), 1))
        return torch.cat(columns, dim=1)

    def _fold(self, layers: Sequence[nn.Linear]) -> Tensor:
        """Return the folded weights, which multiply :meth:`_columns`, ``(E, O, C)``."""
        maps: list[Tensor | None] = [
            torch.block_diag(*(self._table(field).weight.T for field in run))
            for run in self._plan.joined
        ]
        maps += [None] * (len(self._plan.large) + len(self.bag_tables))
        if self.numerical is not None:
            maps.append(torch.cat([self.numerical.weight, self.numerical.bias[:, None]], dim=1))
        weights = [layer.weight for layer in layers]
        if weights[0].device.type != "cpu":  # launching many small products would dominate
            weights = [torch.cat(weights)]
        folded: Tensor = BlockProducts.apply(  # type: ignore[no-untyped-call]
            self._plan.blocks, len(weights), *weights, *maps
        )
        folded = folded.view(len(layers), -1, folded.shape[2])
        bias = torch.stack([layer.bias for layer in layers]).unsqueeze(2)
        if self.numerical is not None:
            folded, numerical_bias = folded.split([folded.shape[2] - 1, 1], dim=2)
            bias = bias + numerical_bias
        return torch.cat([folded, bias], dim=2)

    def _table(self, field: int) -> nn.Embedding:
        return _embeddings(self.tables)[field]

    def _one_hot(self, batch: Batch) -> Tensor:
        """Return the one-hot vectors of the small fields, ``(B, sum of their vocabularies)``."""
        small = batch.categorical.index_select(1, self.get_buffer("_small_fields"))
        positions = small + self.get_buffer("_one_hot_starts")
        dtype = _embeddings(self.tables)[0].weight.dtype
        zeros = torch.zeros(
            len(batch), self._plan.one_hot_width, dtype=dtype, device=positions.device
        )
        return zeros.scatter_(1, positions, 1)

    def _bag_vectors(self, batch: Batch) -> list[Tensor]:
        """Return the vectors of each multi-valued field, ``(B, D)``."""
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
            # Where all weights are zero the sum is zero too, whatever the divisor.
            weights = weights / totals.where(totals != 0, 1)[row]
        tokens, vectors = bags.tokens, table.weight
        if table.sparse and torch.is_grad_enabled():
            # A gradient row per token would take more memory than a dense gradient.
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
    """``W[:, block] @ M`` for each of ``E`` equally shaped matrices and each block of columns.

    All products and the gradient of each ``W`` are written once and in place: the first layers of
    MMoE's experts are the largest tensors of a step, and concatenating them, splitting them and
    concatenating their gradients took a fifth of it.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Sequence[slice], count: int, *tensors: Any) -> Tensor:
        """Return the products, ``(E, O, sum of the columns of M)``.

        Args:
            ctx: Autograd context.
            blocks: Columns of ``W`` that each ``M`` multiplies.
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
        weight_grads = [
            torch.empty_like(w) if n else None
            for w, n in zip(weights, needed[: ctx.count], strict=True)
        ]
        # Transposed, since a product with few columns takes twice as long as one with few rows.
        map_grads = [
            m.new_zeros(m.shape[::-1]).T if n else None
            for m, n in zip(maps, needed[ctx.count :], strict=True)
        ]
        for weight, gradient, weight_grad in zip(weights, gradients[0], weight_grads, strict=True):
            parts = gradient.split(ctx.widths, 1)
            for block, matrix, part, map_grad in zip(
                ctx.blocks, maps, parts, map_grads, strict=True
            ):
                if weight_grad is not None and matrix is None:
                    weight_grad[:, block] = part
                elif weight_grad is not None:
                    torch.mm(part, matrix.T, out=weight_grad[:, block])
                if map_grad is not None:
                    map_grad.T.addmm_(part.T, weight[:, block])
        return (None, None, *weight_grads, *map_grads)


def _widths(schema: Schema, embedding_dim: int | Mapping[Any, int]) -> tuple[dict[str, int], int]:
    """Return the vector width of each field, and the default width."""
    names = [field.name for field in (*schema.categorical, *schema.multivalued)]
    if not isinstance(embedding_dim, Mapping):
        check_integer("model.embedding_dim", embedding_dim, minimum=1)
        return dict.fromkeys(names, embedding_dim), embedding_dim
    widths = {_name_in_data(key, names): width for key, width in embedding_dim.items()}
    for name, width in widths.items():
        check_integer(f"model.embedding_dim.{name}", width, minimum=1)
    if "default" not in widths:
        raise InputError(
            f"model.embedding_dim must have a default for unnamed fields, got {widths}. Set it, "
            "as in {default: 128, 101: 16}."
        )
    default = widths.pop("default")
    _check_names("model.embedding_dim", [*widths], names)
    return dict.fromkeys(names, default) | widths, default


def find_fields(schema: Schema, key: str, fields: Any) -> list[int]:
    """Return the numbers of named fields; multi-valued fields follow the categorical ones.

    Args:
        schema: The fields.
        key: Config key for messages.
        fields: Names; numbers that YAML made of names count.

    Raises:
        InputError: If ``fields`` is not a list of distinct names of fields, at least one.
    """
    names = [field.name for field in (*schema.categorical, *schema.multivalued)]
    if isinstance(fields, str) or not isinstance(fields, Sequence) or not fields:
        raise InputError(
            f"{key} must be a list of at least one field, or null, got {fields!r}. The data has "
            f"{', '.join(names) or 'none'}."
        )
    found = [_name_in_data(name, names) for name in fields]
    _check_names(key, found, names)
    if twice := find_duplicates(found):
        raise InputError(f"{key} must name a field once, got {format_names(twice)} more than once")
    return [names.index(name) for name in found]


def _check_names(key: str, found: Sequence[str], names: Sequence[str]) -> None:
    if unknown := [name for name in found if name not in names]:
        raise InputError(
            f"{key} must name fields of the data ({', '.join(names) or 'none'}), got "
            f"{format_names(unknown)}"
        )


def _name_in_data(key: Any, names: Sequence[str]) -> str:
    # YAML reads the names 101 and 109_14 as the numbers 101 and 10914.
    by_number = {name.replace("_", ""): name for name in names if name[:1].isdigit()}
    return str(key) if str(key) in names else by_number.get(str(key), str(key))


def _join(fields: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Group fields into runs of adjacent ones whose joint vocabulary is small.

    One product with the block-diagonal tables of a run is faster than one per table, whose matrices
    are only a few columns wide.
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
