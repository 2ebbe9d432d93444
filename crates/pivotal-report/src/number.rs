//! Numbers as people read them.

use crate::Metric;

/// `value` with `decimals` digits after the point and a true minus sign; never a negative zero.
pub(crate) fn plain(value: f64, decimals: u8) -> String {
    let text = format!("{value:.*}", usize::from(decimals));
    match text.strip_prefix('-') {
        Some(digits) if digits.bytes().any(|byte| (b'1'..=b'9').contains(&byte)) => {
            format!("−{digits}")
        }
        Some(digits) => digits.into(),
        None => text,
    }
}

/// The same with a sign in front of what is above zero: for differences.
pub(crate) fn signed(value: f64, decimals: u8) -> String {
    let text = plain(value, decimals);
    let nonzero = text.bytes().any(|byte| (b'1'..=b'9').contains(&byte));
    match nonzero && value > 0.0 {
        true => format!("+{text}"),
        false => text,
    }
}

/// Four significant digits without trailing zeros: for a signal, whose scale is not known beforehand.
pub(crate) fn compact(value: f32) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let magnitude = value.abs().log10().floor() as i32;
    if !(-4..6).contains(&magnitude) {
        return format!("{value:.3e}").replace('-', "−");
    }
    let decimals = (3 - magnitude).max(0) as u8;
    let text = plain(f64::from(value), decimals);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').into(),
        false => text,
    }
}

/// The unit with a space in front, or nothing.
pub(crate) fn unit(metric: &Metric) -> String {
    match metric.unit.is_empty() {
        true => String::new(),
        false => format!(" {}", metric.unit),
    }
}

/// `1 seed`, `3 seeds`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        _ => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rounded_zero_has_no_sign() {
        assert_eq!(plain(-0.0004, 3), "0.000");
        assert_eq!(plain(-0.0006, 3), "−0.001");
        assert_eq!(signed(0.0004, 3), "0.000");
        assert_eq!(signed(0.1, 3), "+0.100");
        assert_eq!(signed(-0.1, 3), "−0.100");
    }

    #[test]
    fn signals_keep_four_significant_digits() {
        let texts = [0.0, 1.5, -12.3456, 0.000_123_4, 1e-9, 123_456.0].map(compact);
        assert_eq!(
            texts,
            ["0", "1.5", "−12.35", "0.0001234", "1.000e−9", "123456"]
        );
    }
}
