//! Which sequences attend together.

use std::ops::Range;

use super::StepContext;

/// Samples of one prompt in a task.
const TASK_SEQUENCES: usize = 8;

/// Neighbours that share a prefix, at most [`TASK_SEQUENCES`] together.
pub(super) fn runs(contexts: &[StepContext<'_>]) -> Vec<Range<usize>> {
    let mut runs = Vec::with_capacity(contexts.len());
    let mut start = 0;
    for end in 1..=contexts.len() {
        let shared = end < contexts.len()
            && end - start < TASK_SEQUENCES
            && std::ptr::eq(contexts[end].prefix, contexts[start].prefix);
        if !shared {
            runs.push(start..end);
            start = end;
        }
    }
    runs
}
