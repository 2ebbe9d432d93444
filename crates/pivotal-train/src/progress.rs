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
