//! The largest of some values: what the selections by percentage keep.

/// Flags the `percent` % largest values; of equal ones the first. A part of a token counts as a token, so that any percentage
/// above 0 keeps one of a response that has any.
///
/// # Examples
/// ```
/// use pivotal_credit::top_percent;
/// assert_eq!(top_percent(&[0.1, 0.9, 0.5, 0.9], 25.0), [false, true, false, false]);
/// assert_eq!(top_percent(&[0.1, 0.9, 0.5, 0.9], 30.0), [false, true, false, true]);
/// assert_eq!(top_percent(&[-0.0, 0.0], 1e-9), [true, false]);
/// assert!(top_percent(&[], 30.0).is_empty());
/// ```
pub fn top_percent(values: &[f64], percent: f64) -> Vec<bool> {
    // Less 1e-9: 14 % of 50 tokens is 7.000000000000001 of them in f64.
    let exact = percent.clamp(0.0, 100.0) * values.len() as f64 / 100.0;
    let least = usize::from(exact > 0.0);
    let count = ((exact - 1e-9).ceil() as usize).clamp(least, values.len());
    let mut order: Vec<usize> = (0..values.len()).collect();
    // With 0 added, −0 is 0.
    order.sort_by(|&a, &b| (values[b] + 0.0).total_cmp(&(values[a] + 0.0)));
    let mut keep = vec![false; values.len()];
    order[..count].iter().for_each(|&index| keep[index] = true);
    keep
}
