//! Which token attends to which: spans of a tree-packed batch, checked once and cut into blocks for all layers.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::matmul::Precision;
use crate::processor::{Processor, processor};

/// Consecutive tokens of a tree-packed batch: a prompt, or a response to one.
///
/// Token `start + i` attends to the whole prefix and to tokens `start..=start + i`; its position is `prefix_len + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// First token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// First token of the prefix.
    pub prefix_start: usize,
    /// Tokens of the prefix; 0 for a prompt.
    pub prefix_len: usize,
}

impl Span {
    fn own(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    fn prefix(&self) -> Range<usize> {
        self.prefix_start..self.prefix_start + self.prefix_len
    }
}

/// The heads of grouped-query attention. `heads` is a multiple of `kv_heads`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `i` reads head `i / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Query heads that share a key head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    pub(crate) fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    pub(crate) fn key_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Length of a row of query, key and value.
    #[must_use]
    pub fn joined_width(&self) -> usize {
        self.query_width() + 2 * self.key_width()
    }

    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    #[track_caller]
    pub(crate) fn check(&self) {
        assert!(
            self.kv_heads > 0 && self.head_dim > 0 && self.heads.is_multiple_of(self.kv_heads),
            "`heads` ({}) is not a multiple of `kv_heads` ({}), or `head_dim` ({}) is 0",
            self.heads,
            self.kv_heads,
            self.head_dim
        );
        let heads = self
            .kv_heads
            .checked_mul(2)
            .and_then(|both| both.checked_add(self.heads));
        assert!(
            heads
                .and_then(|heads| heads.checked_mul(self.head_dim))
                .is_some(),
            "a row of {self:?} is longer than can be counted"
        );
    }
}

/// Some consecutive tokens of a span: the queries of one task.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) span: Span,
    /// Index of the first query in the span.
    pub(crate) first: usize,
    pub(crate) rows: usize,
}

impl Block {
    /// Keys the last query sees.
    pub(crate) fn keys(&self) -> usize {
        self.span.prefix_len + self.first + self.rows
    }

    /// The keys as (first token, number, index of the first among the block's keys).
    pub(crate) fn segments(&self) -> [(usize, usize, usize); 2] {
        let Span {
            start,
            prefix_start,
            prefix_len,
            ..
        } = self.span;
        [
            (prefix_start, prefix_len, 0),
            (start, self.first + self.rows, prefix_len),
        ]
    }
}

/// Tokens whose keys or values are packed by twos (bf16 products sum pairs), the first of them at an even place: so a
/// span's result does not depend on where in the batch it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// Index of its first pair among all pairs.
    pub(crate) pair: usize,
}

/// Some consecutive rows (query times group, then head in the group) of a span: the lanes of one task of the vector path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaneBlock {
    pub(crate) span: Span,
    /// First pair of the prefix and of the span's own tokens.
    pub(crate) prefix_pair: usize,
    pub(crate) own_pair: usize,
    /// Index of the first row in the span.
    pub(crate) first: usize,
    pub(crate) rows: usize,
}

impl LaneBlock {
    /// Own keys of the span that the last row sees.
    pub(crate) fn own_keys(&self, group: usize) -> usize {
        (self.first + self.rows - 1) / group + 1
    }

    pub(crate) fn keys(&self, group: usize) -> usize {
        self.span.prefix_len + self.own_keys(group)
    }
}

/// Spans that share keys: their key gradients are summed by one task, in order.
#[derive(Clone, Debug)]
pub(crate) struct Family {
    pub(crate) blocks: Vec<Block>,
    pub(crate) lane_blocks: Vec<LaneBlock>,
    /// The tokens of the family, ascending and disjoint.
    pub(crate) tokens: Vec<Range<usize>>,
}

impl Family {
    /// Its spans, in order.
    pub(crate) fn spans(&self) -> impl Iterator<Item = Span> {
        let first = |block: &&Block| block.first == 0;
        self.blocks.iter().filter(first).map(|block| block.span)
    }

    /// From the first token to the last.
    pub(crate) fn extent(&self) -> Range<usize> {
        match (self.tokens.first(), self.tokens.last()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => 0..0,
        }
    }
}

/// The spans of a batch, checked and cut into blocks. Make one for a batch and use it in every layer.
#[derive(Clone, Debug)]
pub struct AttentionPlan {
    shape: AttentionShape,
    tokens: usize,
    precision: Precision,
    /// Whether the processor has what the vector path needs.
    pub(crate) vectors: bool,
    /// Whether that path's products with bf16 operands use tiles.
    pub(crate) tiles: bool,
    pub(crate) families: Vec<Family>,
    pub(crate) pieces: Vec<Piece>,
    /// Tokens in no span: they attend to nothing.
    pub(crate) gaps: Vec<Range<usize>>,
    /// Multiply-adds of one product over all blocks and heads.
    pub(crate) work: usize,
}

/// Rows (queries times grouped heads) of a block: enough that packing its keys is a small part of multiplying by them.
const BLOCK_ROWS: usize = 96;
/// Rows of a [`LaneBlock`]: three vectors of 16.
pub(crate) const BLOCK_LANES: usize = 48;

impl AttentionPlan {
    /// Plans attention over `spans` in a batch of `tokens` tokens. Empty spans are allowed, tokens in no span too.
    ///
    /// # Panics
    /// If a span or prefix reaches beyond `tokens`, if two spans overlap, or if the heads do not divide.
    #[must_use]
    pub fn new(spans: &[Span], tokens: usize, shape: AttentionShape) -> Self {
        shape.check();
        let mut spans: Vec<Span> = spans.iter().copied().filter(|span| span.len > 0).collect();
        spans.sort_by_key(|span| span.start);
        let mut gaps = Vec::new();
        let mut end = 0;
        for span in &spans {
            let within =
                |start: usize, len| start.checked_add(len).is_some_and(|end| end <= tokens);
            assert!(
                within(span.start, span.len) && within(span.prefix_start, span.prefix_len),
                "{span:?} reaches beyond the {tokens} tokens"
            );
            assert!(span.start >= end, "{span:?} overlaps the span before it");
            gaps.push(end..span.start);
            end = span.own().end;
        }
        gaps.push(end..tokens);
        gaps.retain(|gap| !gap.is_empty());

        let rows = (BLOCK_ROWS / shape.group().max(1)).clamp(8, 64);
        let (pieces, pairs) = pieces(&spans);
        let families = families(&spans, &pairs, rows, shape.group());
        let work = families
            .iter()
            .flat_map(|family| &family.blocks)
            .map(|block| block.rows * block.keys() * shape.query_width())
            .sum();
        Self {
            shape,
            tokens,
            precision: Precision::F32,
            vectors: crate::matmul::bf16_available(),
            tiles: processor() == Processor::Amx,
            families,
            pieces,
            gaps,
            work,
        }
    }

    /// The same plan with the operands of its products rounded to `precision`: [`Precision::F32`] unless said otherwise.
    ///
    /// Softmax, log-sum-exps and all sums stay f32. With [`Precision::Bf16`] queries, keys, values, output gradients,
    /// probabilities and their gradients are rounded where they enter a product; processors without bf16 products stay at f32.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// What the operands are rounded to: never bf16 where the processor cannot multiply that.
    #[must_use]
    pub fn precision(&self) -> Precision {
        if self.vectors {
            self.precision
        } else {
            Precision::F32
        }
    }

    /// The heads it was made for.
    #[must_use]
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Pairs of all pieces.
    pub(crate) fn pairs(&self) -> usize {
        self.pieces
            .last()
            .map_or(0, |piece| piece.pair + piece.len.div_ceil(2))
    }

    /// Tokens of the batch.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// The pieces of all spans and prefixes, and each span's first pairs: of its prefix, and of its own tokens.
fn pieces(spans: &[Span]) -> (Vec<Piece>, Vec<(usize, usize)>) {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut pairs = 0;
    let mut add = |start: usize, len: usize| {
        let pair = pairs;
        pieces.push(Piece { start, len, pair });
        pairs += len.div_ceil(2);
        pair
    };
    let own: Vec<usize> = spans.iter().map(|span| add(span.start, span.len)).collect();
    let mut others: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    let prefix = spans.iter().map(|span| {
        let (start, len) = (span.prefix_start, span.prefix_len);
        match spans.binary_search_by_key(&start, |span| span.start) {
            _ if len == 0 => 0,
            Ok(at) if spans[at].len >= len => own[at],
            _ => *others
                .entry((start, len))
                .or_insert_with(|| add(start, len)),
        }
    });
    let places = prefix.zip(own.iter().copied()).collect();
    (pieces, places)
}

/// Sorts spans into families whose own tokens and prefixes overlap no other family's.
fn families(spans: &[Span], pairs: &[(usize, usize)], rows: usize, group: usize) -> Vec<Family> {
    let mut ranges: Vec<(Range<usize>, usize)> = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        ranges.push((span.own(), index));
        if span.prefix_len > 0 {
            ranges.push((span.prefix(), index));
        }
    }
    ranges.sort_by_key(|(range, index)| (range.start, *index));

    let mut parent: Vec<usize> = (0..spans.len()).collect();
    fn root(parent: &[usize], mut index: usize) -> usize {
        while parent[index] != index {
            index = parent[index];
        }
        index
    }
    let mut runs: Vec<(Range<usize>, usize)> = Vec::new();
    for (range, index) in ranges {
        match runs.last_mut() {
            Some((run, member)) if range.start < run.end => {
                run.end = run.end.max(range.end);
                let (a, b) = (root(&parent, *member), root(&parent, index));
                parent[a.max(b)] = a.min(b);
            }
            _ => runs.push((range, index)),
        }
    }

    let mut place = vec![None; spans.len()];
    let mut families: Vec<Family> = Vec::new();
    for (index, &span) in spans.iter().enumerate() {
        let root = root(&parent, index);
        let at = *place[root].get_or_insert_with(|| {
            families.push(Family {
                blocks: Vec::new(),
                lane_blocks: Vec::new(),
                tokens: Vec::new(),
            });
            families.len() - 1
        });
        families[at]
            .blocks
            .extend((0..span.len).step_by(rows).map(|first| Block {
                span,
                first,
                rows: rows.min(span.len - first),
            }));
        let ((prefix_pair, own_pair), lanes) = (pairs[index], span.len * group);
        families[at]
            .lane_blocks
            .extend((0..lanes).step_by(BLOCK_LANES).map(|first| LaneBlock {
                span,
                prefix_pair,
                own_pair,
                first,
                rows: BLOCK_LANES.min(lanes - first),
            }));
    }
    for (run, member) in runs {
        let at = place[root(&parent, member)].expect("every span has a family");
        families[at].tokens.push(run);
    }
    families
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape {
        heads: 3,
        kv_heads: 1,
        head_dim: 4,
    };

    fn span(start: usize, len: usize, prefix_start: usize, prefix_len: usize) -> Span {
        Span {
            start,
            len,
            prefix_start,
            prefix_len,
        }
    }

    #[test]
    fn responses_join_their_prompt_and_neighbours_stay_apart() {
        let spans = [
            span(0, 4, 0, 0),
            span(4, 2, 0, 4),
            span(6, 3, 0, 4),
            span(9, 5, 0, 0),
            span(20, 1, 9, 5),
        ];
        let plan = AttentionPlan::new(&spans, 22, SHAPE);
        let tokens: Vec<_> = plan
            .families
            .iter()
            .map(|family| family.tokens.clone())
            .collect();
        assert_eq!(tokens, [vec![0..4, 4..6, 6..9], vec![9..14, 20..21]]);
        assert_eq!(plan.gaps, [14..20, 21..22]);
        assert_eq!(plan.families[1].extent(), 9..21);
    }

    #[test]
    fn blocks_tile_each_span() {
        let plan = AttentionPlan::new(&[span(0, 70, 0, 0), span(70, 0, 0, 70)], 70, SHAPE);
        let blocks = &plan.families[0].blocks;
        let sizes: Vec<_> = blocks
            .iter()
            .map(|block| (block.first, block.rows))
            .collect();
        assert_eq!(sizes, [(0, 32), (32, 32), (64, 6)]);
        assert!(plan.gaps.is_empty());
    }

    #[test]
    fn pieces_start_at_even_places_and_prefixes_share_them() {
        let spans = [
            span(0, 5, 0, 0),
            span(5, 3, 0, 5),
            span(8, 2, 0, 3),
            span(10, 2, 1, 4),
            span(12, 1, 1, 4),
        ];
        let plan = AttentionPlan::new(&spans, 13, SHAPE);
        let pieces: Vec<_> = plan
            .pieces
            .iter()
            .map(|p| (p.start, p.len, p.pair))
            .collect();
        let own = [(0, 5, 0), (5, 3, 3), (8, 2, 5), (10, 2, 6), (12, 1, 7)];
        assert_eq!(pieces, [&own[..], &[(1, 4, 8)]].concat());
        assert_eq!(plan.pairs(), 10);
        let blocks = &plan.families[0].lane_blocks;
        let pairs: Vec<_> = blocks.iter().map(|b| (b.prefix_pair, b.own_pair)).collect();
        assert_eq!(pairs, [(0, 0), (0, 3), (0, 5), (8, 6), (8, 7)]);
    }

    #[test]
    fn two_responses_that_share_part_of_a_prefix_are_one_family() {
        let spans = [span(4, 2, 0, 4), span(6, 2, 2, 2), span(8, 1, 0, 0)];
        assert_eq!(AttentionPlan::new(&spans, 9, SHAPE).families.len(), 2);
    }

    #[test]
    #[should_panic(expected = "overlaps the span before it")]
    fn overlapping_spans_panic() {
        let _ = AttentionPlan::new(&[span(0, 3, 0, 0), span(2, 3, 0, 0)], 9, SHAPE);
    }

    #[test]
    #[should_panic(expected = "reaches beyond the 1 tokens")]
    fn a_span_whose_end_cannot_be_counted_panics() {
        let _ = AttentionPlan::new(&[span(usize::MAX, 1, 0, 0)], 1, SHAPE);
    }

    #[test]
    #[should_panic(expected = "reaches beyond the 9 tokens")]
    fn a_prefix_beyond_the_batch_panics() {
        let _ = AttentionPlan::new(&[span(0, 3, 7, 3)], 9, SHAPE);
    }
}
