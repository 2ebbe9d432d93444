//! The key and value gradients of families of spans: each the sum over its blocks, by one task or by several.
//!
//! A family with much work is cut into runs of blocks, each with its own sums, added up afterwards in their order: where to cut
//! depends on the spans alone. At most [`RUNS`] times the gradients' memory is held for it.

use std::ops::Range;

use rayon::prelude::*;

use crate::parallel::{SERIAL_WORK, SharedOut, for_each_block, with_scratch};
use crate::plan::{AttentionPlan, Family};

/// Runs of blocks that a family is cut into at most.
const RUNS: usize = 4;

/// Cuts blocks of so much work each into runs of about equal work, of `least` or more.
pub(crate) fn cut_by_work(work: &[usize], least: usize) -> Vec<Range<usize>> {
    let all: usize = work.iter().sum();
    let runs = (all / least).clamp(1, RUNS);
    let (mut cuts, mut first, mut done) = (Vec::new(), 0, 0);
    for (last, work) in work.iter().enumerate() {
        done += work;
        if done * runs >= all * (cuts.len() + 1) {
            cuts.push(first..last + 1);
            first = last + 1;
        }
    }
    if first < work.len() {
        cuts.push(first..work.len());
    }
    cuts
}

/// Some of a family's blocks, and where their sums go if they are not all of them.
struct Run<'a> {
    family: &'a Family,
    blocks: Range<usize>,
    slot: Option<usize>,
}

/// Sums the gradients of every family and key head of `plan`.
///
/// `cut` says which blocks a run takes, and `floats` how long a family's sums are. `blocks` overwrites sums by those of some
/// blocks of one key head; `write` gets them once they are the family's.
pub(crate) fn sum_by_runs<'a>(
    plan: &'a AttentionPlan,
    cut: impl Fn(&'a Family) -> Vec<Range<usize>>,
    floats: impl Fn(&Family) -> usize + Sync,
    blocks: impl Fn(&'a Family, Range<usize>, usize, &mut [f32]) + Sync,
    write: impl Fn(&Family, usize, &[f32]) + Sync,
) {
    let heads = plan.shape().kv_heads;
    let (mut runs, mut slots) = (Vec::new(), 0);
    for family in &plan.families {
        let cuts = cut(family);
        let several = cuts.len() > 1;
        for blocks in cuts {
            let slot = several.then_some(slots);
            if several {
                slots += floats(family) * heads;
            }
            runs.push(Run {
                family,
                blocks,
                slot,
            });
        }
    }
    with_scratch(slots, |parts| {
        let shared = SharedOut::new(parts);
        let task = |task: usize| {
            let (run, head) = (&runs[task / heads], task % heads);
            let len = floats(run.family);
            if let Some(slot) = run.slot {
                // SAFETY: this task alone has this part of the slot.
                let sums = unsafe { shared.slice(slot + head * len, len) };
                blocks(run.family, run.blocks.clone(), head, sums);
            } else {
                with_scratch(len, |sums| {
                    blocks(run.family, run.blocks.clone(), head, sums);
                    write(run.family, head, sums);
                });
            }
        };
        let tasks = 0..runs.len() * heads;
        if 5 * plan.work < SERIAL_WORK {
            tasks.for_each(task);
        } else {
            tasks.into_par_iter().with_max_len(1).for_each(task);
        }
        let parts = &parts[..];
        for runs in runs.chunk_by(|a, b| std::ptr::eq(a.family, b.family)) {
            let Some(first) = runs[0].slot else { continue };
            let (family, len) = (runs[0].family, floats(runs[0].family));
            for_each_block(heads, 1, len * heads, |heads_here| {
                for head in heads_here {
                    with_scratch(len, |sums| {
                        sums.copy_from_slice(&parts[first + head * len..][..len]);
                        for slot in runs[1..].iter().filter_map(|run| run.slot) {
                            let part = &parts[slot + head * len..][..len];
                            for (sum, part) in sums.iter_mut().zip(part) {
                                *sum += part;
                            }
                        }
                        write(family, head, sums);
                    });
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_cover_all_blocks_in_order() {
        for (work, least, ends) in [
            (vec![], 1, vec![]),
            (vec![5], 10, vec![1]),
            (vec![1; 8], 100, vec![8]),
            (vec![1; 8], 4, vec![4, 8]),
            (vec![1; 8], 1, vec![2, 4, 6, 8]),
            (vec![9, 1, 1, 1], 6, vec![1, 4]),
        ] {
            let mut first = 0;
            let mut expected = Vec::new();
            for end in ends {
                expected.push(first..end);
                first = end;
            }
            assert_eq!(cut_by_work(&work, least), expected, "{work:?} {least}");
        }
    }
}
