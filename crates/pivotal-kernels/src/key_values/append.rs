//! The new token of each sequence on its way from the product that made it to attention.

use super::KeyValues;
use crate::parallel::{SharedOut, check_matrix, for_each_block, with_scratch};
use crate::plan::AttentionShape;
use crate::rope::RopeTable;

/// Multiply-adds that an element costs about as much as, when a row goes to a cache: keys are scattered.
const APPEND_COST: usize = 8;

/// Takes rows of query, key and value apart, one row a sequence: the query goes to `q`, rotated; the key, rotated, and the value
/// become the last position of that sequence's cache.
///
/// # Shapes
/// `joined` is `[sequences, (heads + 2 * kv_heads) * head_dim]`, `q` is `[sequences, heads * head_dim]`; `rope` has a token a
/// sequence.
///
/// # Panics
/// If lengths or the caches do not fit the shape.
pub fn append_step(
    rope: &RopeTable,
    shape: AttentionShape,
    joined: &[f32],
    caches: &mut [&mut KeyValues],
    q: &mut [f32],
) {
    let (queries, keys) = (shape.query_width(), shape.key_width());
    let width = rope.joined_width(joined, shape);
    let sequences = caches.len();
    check_matrix("joined", joined, sequences, width);
    check_matrix("q", q, sequences, queries);
    caches.iter().for_each(|cache| cache.check(shape));
    let (q, caches) = (SharedOut::new(q), SharedCaches(caches.as_mut_ptr().cast()));
    for_each_block(sequences, 1, APPEND_COST * joined.len(), |block| {
        for sequence in block {
            let (query, rest) = joined[sequence * width..][..width].split_at(queries);
            let (key, value) = rest.split_at(keys);
            // SAFETY: row `sequence` of `q` and the cache of that index are this block's own.
            let (q, cache) = unsafe { (q.slice(sequence * queries, queries), caches.at(sequence)) };
            rope.turn(sequence, query, q, 1.0);
            with_scratch(keys, |turned| {
                rope.turn(sequence, key, turned, 1.0);
                cache.extend(turned, value);
            });
        }
    });
}

/// Caches that several tasks append to, each to its own.
#[derive(Clone, Copy)]
struct SharedCaches(*mut *mut KeyValues);

// SAFETY: the pointers come from exclusive borrows that outlive the parallel call, and every task takes other ones.
unsafe impl Send for SharedCaches {}
// SAFETY: as above; sharing the wrapper only copies the address.
unsafe impl Sync for SharedCaches {}

impl SharedCaches {
    /// # Safety
    /// There are more than `index`, and no other task has this one meanwhile.
    unsafe fn at<'a>(self, index: usize) -> &'a mut KeyValues {
        // SAFETY: the caller's promise.
        unsafe { &mut **self.0.add(index) }
    }
}
