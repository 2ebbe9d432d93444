//! Step-by-step column arithmetic with known mistakes.
//!
//! # What a sample looks like
//!
//! One character is one token ([`vocabulary`]). Numbers have two digits, **units first**, so that a carry can be known
//! before the digit that it changes is written. A prompt lists operations, each under a letter that counts down to `A`,
//! then the start value; the response works through them:
//!
//! ```text
//! prompt    ^D-60C+61B-41A+90=25;                              52 - 6 + 16 - 14 + 9
//! response  25D-60=64;64C+61=26;26B-41=84;84A+90=75;$          a step is ten tokens
//!           ││││││││││
//!           │││││││└┴┴ result digits, units first, then `;`
//!           ││└┴┴┴┴ letter, operator and operand restated from the prompt, then `=`
//!           └┴ left operand: the result of the step before
//! ```
//!
//! The right response to a prompt is unique, so P(exact) needs no sampling: it is `exp(Σ log p)` of that response. Results
//! are columns of digits: what runs over two digits is lost (arithmetic modulo 100), which only happens after a mistake.
//!
//! # Mistakes
//!
//! [`mistakes`] writes responses with mistakes at known rates. A *forgotten carry* (or borrow) leaves the tens digit one off;
//! a *slip* puts either result digit one off; a *followed claim* copies a wrong result that the prompt plants (`D-60?56…`
//! claims that step D gives 65). Forgotten carries and claims are believed: they *propagate*, the next step restates what
//! was written. A slip either propagates or is *local*: the next step restates the right result, as if only the pen had slipped.
//!
//! # Truth
//!
//! [`truth`] judges any response, also a sampled one: **a token is wrong if it is not the correct continuation of what
//! stands before it**. A step that builds correctly on a wrong result is therefore right; after a wrong result both that
//! result and the right one may be restated. [`judge`] reads a whole response and says whether, and how far, it is right.
//!
//! # Data
//!
//! | module | makes |
//! |---|---|
//! | [`problem`] | problems of a shape, in one of three disjoint [`Partition`](problem::Partition)s |
//! | [`corpus`] | batches to train the starting policy from, with a curriculum |
//! | [`pairs`] | preference pairs: mistakes on both sides, labels flipped at a known rate |
//! | [`splits`] | held-out, tuning, shifted, adversarial and retention sets |
//! | [`retention`] | the second skill: sorting digits |
//! | [`tokenizer()`] | the world's characters as a tokenizer, for recipes that want one |
//!
//! Everything is a function of a seed, in integers, from ChaCha streams: the same bytes on every machine.
//!
//! # Examples
//! ```
//! use pivotal_lab::world::{judge::judge, mistakes::right_response, truth::label, vocabulary};
//! use pivotal_lab::world::problem::{Operation, Operator, Problem};
//!
//! let problem = Problem::new(52, vec![Operation::new(Operator::Minus, 6)?], None)?;
//! assert_eq!(vocabulary::decode(&problem.prompt())?, "^A-60=25;");
//!
//! let right = right_response(&problem);
//! assert_eq!(vocabulary::decode(&right)?, "25A-60=64;$");
//! assert!(judge(&problem, &right).exact);
//!
//! // The borrow is forgotten: 52 - 6 = 56.
//! let wrong = vocabulary::encode("25A-60=65;$")?;
//! let labels = label(&problem, &wrong);
//! let positions: Vec<usize> = (0..wrong.len()).filter(|&token| !labels[token].right).collect();
//! assert_eq!(positions, [8]);
//! # Ok::<(), pivotal_lab::world::WorldError>(())
//! ```

pub mod corpus;
pub(crate) mod draw;
mod error;
pub mod judge;
pub mod mistakes;
pub mod pairs;
pub mod problem;
pub mod retention;
pub mod splits;
mod tokenizer;
pub mod truth;
pub mod vocabulary;

pub use error::WorldError;
pub use tokenizer::tokenizer;
