//! Worlds in which the truth of every token is known, so that a credit rule can be measured instead of believed.
//!
//! [`world`] is the one that exists: step-by-step column arithmetic, in which a policy forgets carries. It needs no
//! tensor and no model: it makes token ids, and says which of them are wrong.

pub mod world;
