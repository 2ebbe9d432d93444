//! Packing, micro-batches and the order of batches.

use pivotal_core::{TokenMask, TokenizedPair, TokenizedResponse};
use pivotal_data::{
    BatchOptions, Batcher, Cursor, DataError, Order, gather_all, gather_kept, micro_batches,
    pack_pairs, pack_responses, unpack,
};
use proptest::prelude::*;

fn ids(max: usize) -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(0u32..50, 1..max)
}

fn pairs() -> impl Strategy<Value = Vec<TokenizedPair>> {
    let pair = (ids(6), ids(8), ids(8)).prop_map(|(prompt, chosen, rejected)| TokenizedPair {
        id: 1,
        prompt,
        chosen,
        rejected,
    });
    proptest::collection::vec(pair, 1..6)
}

proptest! {
    #[test]
    fn unpacking_gives_the_sequences_back(pairs in pairs()) {
        let pack = pack_pairs(&pairs).unwrap();
        let expected: Vec<_> = pairs.iter()
            .flat_map(|p| [(p.prompt.clone(), p.chosen.clone()), (p.prompt.clone(), p.rejected.clone())])
            .collect();
        prop_assert_eq!(unpack(&pack), expected);
        let stored: usize = pairs.iter().map(|p| p.prompt.len() + p.chosen.len() + p.rejected.len()).sum();
        prop_assert_eq!(pack.len(), stored, "each prompt is stored once");
        prop_assert_eq!(&pack, &pack_pairs(&pairs).unwrap());
    }

    #[test]
    fn detail_04_a_gathered_token_is_predicted_by_the_one_before_it(pairs in pairs(), flip in any::<u64>()) {
        let pack = pack_pairs(&pairs).unwrap();
        for gather in gather_all(&pack) {
            let (prompt, response) = &unpack(&pack)[gather.response];
            let joint = [prompt.as_slice(), response].concat();
            let at = prompt.len() + gather.position;
            prop_assert_eq!(gather.target, joint[at]);
            prop_assert_eq!(pack.token_ids[gather.source], joint[at - 1]);
            prop_assert_eq!(pack.position_ids[gather.source] as usize, at - 1);
        }
        let keep: Vec<TokenMask> = (0..pack.responses.len())
            .map(|r| (0..pack.response_span(r).len).map(|t| flip >> ((r * 7 + t) % 64) & 1 == 1).collect::<Vec<_>>().into())
            .collect();
        let kept = gather_kept(&pack, &keep).unwrap();
        let expected: Vec<_> = gather_all(&pack).into_iter()
            .filter(|g| keep[g.response].as_slice()[g.position]).collect();
        prop_assert_eq!(kept, expected);
    }

    #[test]
    fn micro_batches_tile_the_items_within_the_budget(counts in proptest::collection::vec(1usize..40, 0..30), budget in 1usize..80) {
        let batches = micro_batches(&counts, budget).unwrap();
        let mut next = 0;
        for batch in &batches {
            prop_assert_eq!(batch.start, next);
            prop_assert!(!batch.is_empty());
            let tokens: usize = counts[batch.clone()].iter().sum();
            prop_assert!(tokens <= budget || batch.len() == 1);
            if batch.end < counts.len() {
                prop_assert!(tokens + counts[batch.end] > budget, "the next item would have fitted");
            }
            next = batch.end;
        }
        prop_assert_eq!(next, counts.len());
    }

    #[test]
    fn an_epoch_visits_every_item_once_and_resumes_anywhere(
        lengths in proptest::collection::vec(1usize..100, 1..40),
        size in 1usize..7, window in 1usize..4, which in 0usize..3, seed in any::<u64>(), skip in 0usize..30,
    ) {
        let order = [Order::Sequential, Order::Shuffled, Order::LengthGrouped { window_batches: window }][which];
        let options = BatchOptions { seed, items_per_batch: size, order };
        let mut batcher = Batcher::new(lengths.clone(), options, Cursor::default()).unwrap();
        let epoch = batcher.batches_per_epoch();
        prop_assert_eq!(epoch, lengths.len().div_ceil(size));
        let mut visited: Vec<usize> = batcher.clone().take(epoch).flat_map(|batch| batch.items).collect();
        visited.sort_unstable();
        prop_assert_eq!(visited, (0..lengths.len()).collect::<Vec<_>>());
        for _ in 0..skip {
            batcher.next();
        }
        let mut resumed = Batcher::new(lengths, options, batcher.cursor()).unwrap();
        for _ in 0..2 * epoch {
            prop_assert_eq!(resumed.next(), batcher.next());
        }
    }
}

#[test]
fn neighbours_with_one_prompt_share_it() {
    let response = |prompt: &[u32], response: &[u32]| TokenizedResponse {
        id: 1,
        prompt: prompt.into(),
        response: response.into(),
        response_mask: vec![true; response.len()],
    };
    let responses = [
        response(&[1, 2], &[3]),
        response(&[1, 2], &[4, 5]),
        response(&[9], &[6]),
        response(&[1, 2], &[7]),
    ];
    let pack = pack_responses(&responses).unwrap();
    assert_eq!(pack.token_ids, [1, 2, 3, 4, 5, 9, 6, 1, 2, 7]);
    let back: Vec<_> = unpack(&pack)
        .into_iter()
        .map(|(_, response)| response)
        .collect();
    assert_eq!(back, [vec![3], vec![4, 5], vec![6], vec![7]]);
}

#[test]
fn masks_of_another_shape_are_refused() {
    let pair = TokenizedPair {
        id: 1,
        prompt: vec![1],
        chosen: vec![2, 3],
        rejected: vec![4],
    };
    let pack = pack_pairs(&[pair]).unwrap();
    let fault = |keep: &[TokenMask]| gather_kept(&pack, keep).unwrap_err().to_string();
    assert_eq!(
        fault(&[TokenMask::all(2)]),
        "the masks cover 1 responses, expected 2"
    );
    assert_eq!(
        fault(&[TokenMask::all(2), TokenMask::all(3)]),
        "the masks cover 3 tokens, expected 1"
    );
}

/// The order is part of what makes a run repeatable: it may not change between versions or platforms.
#[test]
fn the_shuffle_is_fixed() {
    let options = BatchOptions {
        seed: 42,
        items_per_batch: 4,
        order: Order::Shuffled,
    };
    let batches: Vec<_> = Batcher::new(vec![1; 8], options, Cursor::default())
        .unwrap()
        .take(4)
        .map(|b| b.items)
        .collect();
    insta::assert_snapshot!(format!("{batches:?}"), @r#"[[2, 1, 4, 7], [0, 5, 6, 3], [2, 5, 6, 7], [3, 0, 4, 1]]"#);
}

#[test]
fn length_groups_hold_similar_lengths() {
    let lengths: Vec<usize> = (0..64).map(|i| (i * 37) % 64).collect();
    let options = BatchOptions {
        seed: 1,
        items_per_batch: 8,
        order: Order::LengthGrouped { window_batches: 8 },
    };
    for batch in Batcher::new(lengths.clone(), options, Cursor::default())
        .unwrap()
        .take(8)
    {
        let of_batch: Vec<usize> = batch.items.iter().map(|&item| lengths[item]).collect();
        assert_eq!(
            of_batch.iter().max().unwrap() - of_batch.iter().min().unwrap(),
            7
        );
    }
}

#[test]
fn settings_of_zero_and_stale_cursors_are_refused() {
    let options = BatchOptions {
        seed: 1,
        items_per_batch: 2,
        order: Order::Sequential,
    };
    let new = |lengths: Vec<usize>, options, batch| {
        Batcher::new(lengths, options, Cursor { epoch: 0, batch }).unwrap_err()
    };
    assert!(matches!(
        new(vec![], options, 0),
        DataError::Zero { name: "items" }
    ));
    let none = BatchOptions {
        items_per_batch: 0,
        ..options
    };
    assert!(matches!(
        new(vec![1], none, 0),
        DataError::Zero {
            name: "items_per_batch"
        }
    ));
    assert!(matches!(
        new(vec![1, 1, 1], options, 2),
        DataError::CursorRange {
            batch: 2,
            batches: 2
        }
    ));
    assert!(matches!(
        micro_batches(&[1], 0),
        Err(DataError::Zero { name: "budget" })
    ));
}
