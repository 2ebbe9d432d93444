//! Reports of Pivotal studies: a [`Study`] holds what was run and measured, a [`Report`] analyses it once and shows it
//! as plain text, Markdown, SVG or one self-contained HTML page.
//!
//! A difference never appears without its interval, and an interval is never invented: one seed gives none.
//! Nothing here knows a tensor or a trainer; the input is numbers, sentences and
//! [`CreditRecord`](pivotal_core::CreditRecord)s.

mod analysis;
mod error;
mod forest;
mod html;
mod markdown;
mod number;
mod report;
mod response_text;
mod sentences;
mod study;
mod table;
mod terminal;
mod text;
mod token_strip;

pub use analysis::{Analysis, ComparisonResult, Estimate, Outcome};
pub use error::Error;
pub use report::Report;
pub use response_text::{Glyphs, render_response, render_responses};
pub use study::{
    Arm, Better, Comparison, Metric, PairView, Role, SeedValues, SignalPair, SignalRow, Study,
};
pub use terminal::Colour;
