//! The numbers of a run in words.

use std::time::Duration;

use super::course::{Course, Notice};

/// One step in one line.
pub(super) fn line(course: &Course, now: Duration) -> String {
    let mut parts: Vec<String> = values(course)
        .into_iter()
        .map(|(label, value)| format!("{label} {value}"))
        .collect();
    parts.extend(speed(course));
    parts.extend(shares(course).map(|shares| format!("time {shares}")));
    parts.push(format!("elapsed {}", span(now)));
    parts.extend(course.eta().map(|eta| format!("eta {}", span(eta))));
    format!(
        "{} {}: {}",
        course.recipe,
        position(course),
        parts.join(", ")
    )
}

/// A warning, with the step that fired it.
pub(super) fn notice(notice: &Notice) -> String {
    match (notice.step, notice.count) {
        (0, _) => format!("warning: {}", notice.text),
        (step, 1) => format!("warning: step {step}: {}", notice.text),
        (step, count) => format!(
            "warning: step {step}: {} ({count} times so far)",
            notice.text
        ),
    }
}

/// `12/400`.
pub(super) fn position(course: &Course) -> String {
    format!("{}/{}", course.step, course.steps())
}

/// The last step's numbers by name; none before the first.
pub(super) fn values(course: &Course) -> Vec<(&'static str, String)> {
    let Some(numbers) = &course.numbers else {
        return Vec::new();
    };
    let mut values = vec![("loss", number(numbers.loss))];
    let mut add = |label, value: Option<String>| values.extend(value.map(|value| (label, value)));
    add("score", numbers.score.map(|score| format!("{score:.3}")));
    add("accuracy", numbers.accuracy.map(percent));
    add("kl", numbers.kl.map(number));
    add("kept", numbers.kept_fraction.map(percent));
    let segments = numbers.segments_per_100_tokens;
    add(
        "segments/100",
        segments.map(|segments| format!("{segments:.1}")),
    );
    add("grad", Some(format!("{:.3}", numbers.grad_norm)));
    add("lr", Some(format!("{:.1e}", numbers.lr)));
    values
}

/// With four places, and no zero below zero.
pub(super) fn number(number: f64) -> String {
    let text = format!("{number:.4}");
    match text.strip_prefix('-') {
        Some(zero) if zero.chars().all(|digit| "0.".contains(digit)) => zero.to_owned(),
        _ => text,
    }
}

/// `1,240 tokens/s`.
pub(super) fn speed(course: &Course) -> Option<String> {
    let speed = course.tokens_per_second()?;
    Some(match speed < 10.0 {
        true => format!("{speed:.1} tokens/s"),
        false => format!("{} tokens/s", thousands(speed.round() as u64)),
    })
}

/// `generation 60 % scoring 10 % update 30 %`.
fn shares(course: &Course) -> Option<String> {
    let shares = course.shares()?;
    let named = PARTS.iter().zip(shares);
    let each = named.map(|(name, share)| format!("{name} {}", percent(share)));
    Some(each.collect::<Vec<_>>().join(" "))
}

/// The parts of a step, in the order of its timings.
pub(super) const PARTS: [&str; 3] = ["generation", "scoring", "update"];

pub(super) fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

/// `1d 2h`, `3h 20m`, `4m 05s` or `6s`.
pub(super) fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
