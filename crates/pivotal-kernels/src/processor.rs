//! Which instructions the kernels use: found once, chosen once, and the same for the whole process.

use std::sync::OnceLock;

/// What the kernels use of the processor, each with all that stands before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Processor {
    /// What the build asks for; products with bf16 operands are then products in f32.
    Portable,
    /// AVX-512 with BF16.
    Avx512,
    /// AMX with BF16: tiles of 16 rows and 16 columns.
    Amx,
}

impl Processor {
    /// As files and flags have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }
}

static CHOSEN: OnceLock<Processor> = OnceLock::new();

/// What the kernels use here: the most that this processor and its system offer, unless [`limit_processor`] or
/// [`allowed_processor`] says less.
///
/// # Panics
/// Where [`allowed_processor`] has an error, by the first call.
#[must_use]
pub fn processor() -> Processor {
    #[cfg(test)]
    if let Some(forced) = crate::testing::forced_processor() {
        return forced.min(found());
    }
    *CHOSEN.get_or_init(found)
}

/// Lets the kernels use at most `most`, and returns what they will use: less where the processor has less.
///
/// For measurements and checks of one path on a machine that has a faster one. What was packed for one path is not for
/// another, so the first call of any kernel settles the choice.
///
/// # Errors
/// What the kernels use, if that is settled already and is something else.
pub fn limit_processor(most: Processor) -> Result<Processor, Processor> {
    let wanted = found().min(most);
    let chosen = *CHOSEN.get_or_init(|| wanted);
    if chosen == wanted {
        Ok(chosen)
    } else {
        Err(chosen)
    }
}

/// The most that the environment's `PIVOTAL_PROCESSOR` (a [`Processor::name`]) lets the kernels use; `Amx`, which is all there
/// is, where it is not set. Products of f32 that are the `gemm` crate's choose their instructions by themselves.
///
/// # Errors
/// Its value, if that is another.
pub fn allowed_processor() -> Result<Processor, String> {
    match std::env::var("PIVOTAL_PROCESSOR") {
        Err(std::env::VarError::NotPresent) => Ok(Processor::Amx),
        Err(std::env::VarError::NotUnicode(value)) => Err(value.to_string_lossy().into_owned()),
        Ok(value) => {
            let mut all = [Processor::Portable, Processor::Avx512, Processor::Amx].into_iter();
            all.find(|path| path.name() == value).ok_or(value)
        }
    }
}

fn found() -> Processor {
    static FOUND: OnceLock<Processor> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let allowed = allowed_processor();
        let allowed = allowed.unwrap_or_else(|value| panic!("`PIVOTAL_PROCESSOR` is `{value}`"));
        offered().min(allowed)
    })
}

fn offered() -> Processor {
    #[cfg(target_arch = "x86_64")]
    {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        match avx512 {
            true if crate::amx::offered() => Processor::Amx,
            true => Processor::Avx512,
            false => Processor::Portable,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    Processor::Portable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_choice_stays() {
        let chosen = processor();
        assert!(chosen <= found());
        assert_eq!(limit_processor(chosen), Ok(chosen));
        for other in [Processor::Portable, Processor::Avx512] {
            let answer = limit_processor(other);
            assert_eq!(answer.is_ok(), found().min(other) == chosen);
            assert_eq!(answer.unwrap_or_else(|settled| settled), chosen);
        }
    }
}
