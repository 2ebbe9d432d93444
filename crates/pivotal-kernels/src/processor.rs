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

static CHOSEN: OnceLock<Processor> = OnceLock::new();

/// What the kernels use here: the most that this processor and its system offer, unless [`limit_processor`] said less.
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

fn found() -> Processor {
    static FOUND: OnceLock<Processor> = OnceLock::new();
    *FOUND.get_or_init(|| {
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
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_choice_stays() {
        let chosen = processor();
        assert!(chosen <= found());
        if crate::testing::forced_processor().is_none() {
            assert_eq!(limit_processor(chosen), Ok(chosen));
            for other in [Processor::Portable, Processor::Avx512] {
                let answer = limit_processor(other);
                assert_eq!(answer.is_ok(), other == chosen);
                assert_eq!(answer.unwrap_or_else(|settled| settled), chosen);
            }
        }
    }
}
