//! Area under the receiver operating characteristic.

/// The probability that a random positive scores above a random negative, ties counting one half (the Mann–Whitney
/// statistic); `None` unless both kinds occur.
///
/// # Panics
/// If the two slices differ in length.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::auc;
/// // Positives 3 and 1 against negatives 2 and 1: 3 beats both, 1 loses to 2 and ties with 1: 2.5 of 4.
/// assert_eq!(auc(&[3.0, 1.0, 2.0, 1.0], &[true, true, false, false]), Some(0.625));
/// ```
pub fn auc<T: Copy + Into<f64>>(scores: &[T], positive: &[bool]) -> Option<f64> {
    weighted_auc(scores, positive, &vec![1.0; scores.len()])
}

/// [`auc`] where every item counts with its weight, as in a draw of one positive and one negative with probabilities
/// proportional to the weights; `None` unless both kinds have weight above 0.
///
/// # Panics
/// If the slices differ in length, or a weight is negative or not finite.
pub fn weighted_auc<T: Copy + Into<f64>>(
    scores: &[T],
    positive: &[bool],
    weights: &[f64],
) -> Option<f64> {
    assert_eq!(
        scores.len(),
        positive.len(),
        "scores and labels differ in number"
    );
    assert_eq!(
        scores.len(),
        weights.len(),
        "scores and weights differ in number"
    );
    assert!(
        weights
            .iter()
            .all(|weight| weight.is_finite() && *weight >= 0.0),
        "a weight is negative or not finite"
    );
    let mut items: Vec<(f64, bool, f64)> = scores
        .iter()
        .zip(positive)
        .zip(weights)
        .map(|((&score, &positive), &weight)| (score.into(), positive, weight))
        .collect();
    items.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut positives, mut negatives, mut wins) = (0.0, 0.0, 0.0);
    // `==`, not the sort's total order: 0.0 and -0.0 are a tie.
    for ties in items.chunk_by(|a, b| a.0 == b.0) {
        let (mut up, mut down) = (0.0, 0.0);
        for &(_, positive, weight) in ties {
            if positive {
                up += weight;
            } else {
                down += weight;
            }
        }
        wins += up * (negatives + 0.5 * down);
        positives += up;
        negatives += down;
    }
    (positives > 0.0 && negatives > 0.0).then(|| wins / (positives * negatives))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_kind_alone_has_no_auc() {
        assert_eq!(auc(&[1.0, 2.0], &[true, true]), None);
        assert_eq!(auc::<f64>(&[], &[]), None);
        assert_eq!(weighted_auc(&[1.0, 2.0], &[true, false], &[1.0, 0.0]), None);
    }

    #[test]
    fn ends_and_ties() {
        assert_eq!(auc(&[1.0, 2.0], &[false, true]), Some(1.0));
        assert_eq!(auc(&[2.0, 1.0], &[false, true]), Some(0.0));
        assert_eq!(auc(&[0.0, -0.0], &[false, true]), Some(0.5));
    }

    fn items() -> impl Strategy<Value = Vec<(i8, bool, u8)>> {
        prop::collection::vec((-3..3i8, any::<bool>(), 1..4u8), 0..40)
    }

    proptest! {
        #[test]
        fn is_the_share_of_pairs_won(items in items()) {
            let scores: Vec<f32> = items.iter().map(|item| f32::from(item.0)).collect();
            let labels: Vec<bool> = items.iter().map(|item| item.1).collect();
            let (mut won, mut pairs) = (0.0, 0.0);
            for a in items.iter().filter(|item| item.1) {
                for b in items.iter().filter(|item| !item.1) {
                    pairs += 1.0;
                    won += if a.0 > b.0 { 1.0 } else if a.0 == b.0 { 0.5 } else { 0.0 };
                }
            }
            let got = auc(&scores, &labels);
            prop_assert_eq!(got.is_some(), pairs > 0.0);
            if let Some(area) = got {
                prop_assert!((area - won / pairs).abs() < 1e-12);
            }
        }

        #[test]
        fn a_weight_is_that_many_copies(items in items()) {
            let unzip = |items: &[(i8, bool, u8)]| -> (Vec<f32>, Vec<bool>) {
                items.iter().map(|item| (f32::from(item.0), item.1)).unzip()
            };
            let weights: Vec<f64> = items.iter().map(|item| f64::from(item.2)).collect();
            let copies: Vec<_> =
                items.iter().flat_map(|&item| std::iter::repeat_n(item, usize::from(item.2))).collect();
            let (scores, labels) = unzip(&items);
            let (many_scores, many_labels) = unzip(&copies);
            let (weighted, copied) =
                (weighted_auc(&scores, &labels, &weights), auc(&many_scores, &many_labels));
            prop_assert_eq!(weighted.is_some(), copied.is_some());
            prop_assert!((weighted.unwrap_or(0.0) - copied.unwrap_or(0.0)).abs() < 1e-12);
        }

        #[test]
        fn flipping_the_scores_flips_the_area(items in items()) {
            let scores: Vec<f64> = items.iter().map(|item| f64::from(item.0)).collect();
            let flipped: Vec<f64> = scores.iter().map(|score| -score).collect();
            let labels: Vec<bool> = items.iter().map(|item| item.1).collect();
            if let Some(area) = auc(&scores, &labels) {
                prop_assert!((area + auc(&flipped, &labels).unwrap() - 1.0).abs() < 1e-12);
            }
        }
    }
}
