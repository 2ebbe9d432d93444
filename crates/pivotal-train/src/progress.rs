//! Progress on a terminal; silence elsewhere.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `steps` named `name`, drawn on standard error only where that is a terminal.
pub(crate) fn bar(name: &str, steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {msg} eta {eta}")
        .expect("the template is fixed");
    ProgressBar::new(steps)
        .with_style(style)
        .with_prefix(name.to_owned())
}

/// What scoring tells its progress to: [`bar`] over `groups`, cleared at the end.
pub(crate) fn scoring(name: &str, groups: usize) -> impl FnMut(usize) {
    let bar = bar(name, groups as u64);
    move |done| match done < groups {
        true => bar.set_position(done as u64),
        false => bar.finish_and_clear(),
    }
}
