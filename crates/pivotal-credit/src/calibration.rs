//! The threshold that best separates the tokens of chosen responses from those of rejected ones (METHOD, section 3).

/// What [`calibrate`] finds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calibration {
    /// The threshold: halfway between two neighbouring values.
    pub threshold: f32,
    /// (share of chosen tokens above + share of rejected tokens not above) / 2: ½ is no separation at all.
    pub balanced_accuracy: f64,
}

/// The threshold of highest balanced accuracy (Youden 1950), the lowest of those equally good; `None` where one side has no
/// token. Where none separates at all, that is just below every value.
///
/// # Examples
/// ```
/// use pivotal_credit::calibrate;
/// let found = calibrate(&[1.0, 2.0, -1.0], &[-2.0, 0.0]).unwrap();
/// // Above ½: two of three chosen tokens and no rejected one.
/// assert_eq!((found.threshold, found.balanced_accuracy), (0.5, 5.0 / 6.0));
/// assert_eq!(calibrate(&[1.0], &[]), None);
/// ```
pub fn calibrate(chosen: &[f32], rejected: &[f32]) -> Option<Calibration> {
    if chosen.is_empty() || rejected.is_empty() {
        return None;
    }
    let tagged = |values: &[f32], is_chosen| -> Vec<(f32, bool)> {
        values.iter().map(|&value| (value, is_chosen)).collect()
    };
    let mut all = [tagged(chosen, true), tagged(rejected, false)].concat();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (of_chosen, of_rejected) = (chosen.len() as u128, rejected.len() as u128);
    let mut above = of_chosen;
    let mut below = 0_u128;
    // Hits as a whole number over 2 · chosen · rejected, so that ties are ties.
    let mut best = (of_chosen * of_rejected, all[0].0.next_down().max(f32::MIN));
    for pair in all.windows(2) {
        let [(low, is_chosen), (high, _)] = [pair[0], pair[1]];
        if is_chosen {
            above -= 1;
        } else {
            below += 1;
        }
        let hits = above * of_rejected + below * of_chosen;
        if low < high && hits > best.0 {
            let middle = ((f64::from(low) + f64::from(high)) / 2.0) as f32;
            // Between two neighbouring floats there is nothing: `low` is not above itself.
            best = (hits, if middle < high { middle } else { low });
        }
    }
    Some(Calibration {
        threshold: best.1,
        balanced_accuracy: best.0 as f64 / (2 * of_chosen * of_rejected) as f64,
    })
}
