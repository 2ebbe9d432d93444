//! What a damaged or hostile GGUF gets: an error that says where, and no memory beyond the file's own.

use pivotal_core::{ErrorKind, HasKind};
use pivotal_model::{Error, GgufFault, load};
use proptest::prelude::*;

use super::builder::Builder;
use super::{golden, load_bytes, memory};

/// Above all that this process needs while SmolLM2 loads beside these tests; below what a hostile length asks for.
const PEAK_BYTES: u64 = 2 << 30;

fn fault(bytes: &[u8]) -> GgufFault {
    match load_bytes(bytes).unwrap_err() {
        Error::Gguf { fault, .. } => fault,
        other => panic!("{other}"),
    }
}

fn blocks() -> Vec<u8> {
    std::fs::read(golden("gguf/blocks.gguf")).unwrap()
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = blocks();
    load_bytes(&bytes).unwrap();
    // The counts and first keys byte by byte, then samples. The writer pads the last tensor: losing padding is no loss.
    let lengths = (0..300)
        .chain((300..2500).step_by(7))
        .chain((2500..bytes.len() - 64).step_by(997));
    for length in lengths {
        let error = load_bytes(&bytes[..length]).unwrap_err();
        assert!(matches!(error, Error::Gguf { .. }), "{length}: {error}");
        assert_eq!(error.kind(), ErrorKind::Input);
    }
    assert_eq!(
        fault(&bytes[..20]),
        GgufFault::Truncated {
            what: "the metadata count",
            needed: 8,
            left: 4
        }
    );
}

#[test]
fn lengths_beyond_the_file_are_refused_before_they_are_used() {
    let growth = memory::peak_growth(|| {
        for length in [u64::MAX, u64::MAX / 8 + 1, 1 << 62, 1 << 40, 1 << 33] {
            let huge = length.to_le_bytes();
            let array = |kind: u32| [&kind.to_le_bytes()[..], &huge[..]].concat();
            let builder = Builder::default();
            let cases = [
                builder.clone().raw("key", 8, &huge).bytes(),
                builder.clone().raw("key", 9, &array(8)).bytes(),
                builder.clone().raw("key", 9, &array(0)).bytes(),
                builder.clone().raw("key", 9, &array(12)).bytes(),
                builder.bytes_with_counts(3, 0, length),
                builder.bytes_with_counts(3, length, 0),
                // The first key's own length.
                [&builder.bytes_with_counts(3, 0, 1)[..24], &huge[..]].concat(),
            ];
            for (index, bytes) in cases.iter().enumerate() {
                let fault = fault(bytes);
                assert!(
                    matches!(fault, GgufFault::Truncated { .. }),
                    "{index}: {fault}"
                );
            }
        }
    });
    assert!(growth < PEAK_BYTES, "{growth} bytes");
}

#[test]
fn what_breaks_the_format_is_named() {
    let new = Builder::default;
    let expect = |builder: Builder, expected: GgufFault| {
        assert_eq!(fault(&builder.bytes()), expected);
    };
    assert_eq!(fault(b"GGML\0\0\0\0"), GgufFault::Magic);
    for version in [0, 1, 4, 3u32.swap_bytes()] {
        let bytes = new().bytes_with_counts(version, 0, 0);
        assert_eq!(fault(&bytes), GgufFault::Version(version));
    }
    let not_text = [&2u64.to_le_bytes()[..], b"\xff\xfe"].concat();
    expect(new().raw("key", 8, &not_text), GgufFault::Utf8("a string"));
    expect(
        new().raw("key", 13, &[0; 8]),
        GgufFault::ValueType {
            key: "key".into(),
            found: 13,
        },
    );
    let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    expect(
        new().raw("key", 9, &nested),
        GgufFault::NestedArray("key".into()),
    );
    expect(
        new().raw("key", 7, &[2]),
        GgufFault::Boolean {
            key: "key".into(),
            found: 2,
        },
    );
    expect(
        new().size("key", 1).size("key", 2),
        GgufFault::Duplicate("key".into()),
    );
    for alignment in [0, 1, 48, 1 << 20] {
        expect(
            new().size("general.alignment", alignment),
            GgufFault::Alignment(alignment as u64),
        );
    }
    expect(
        new().text("general.alignment", "32"),
        GgufFault::Alignment(0),
    );
}

#[test]
fn tensors_outside_the_file_or_over_each_other_are_named() {
    let new = || Builder::default().tensor("a", &[16], &[0.0; 16]);
    let name = || "b".to_owned();
    for dimensions in [
        &[0][..],
        &[1, 0],
        &[1 << 32, 1 << 32],
        &[u64::MAX],
        &[u64::MAX, 2],
        &[1; 5],
    ] {
        let got = fault(&new().header("b", dimensions, 0, 64).bytes());
        let offset = matches!(got, GgufFault::Offset { .. }) && dimensions == [u64::MAX];
        assert!(
            offset || got == GgufFault::Dimensions(name()),
            "{dimensions:?}: {got}"
        );
    }
    for (at, length) in [
        (64, 4),
        (1 << 40, 4),
        (u64::MAX - 31, 4),
        (33, 4),
        (u64::MAX, 4),
    ] {
        let got = fault(&new().header("b", &[1], 0, at).bytes());
        let overlap = at == 33 && matches!(got, GgufFault::Overlap(..));
        let expected = GgufFault::Offset {
            tensor: name(),
            at,
            length,
            data: 64,
        };
        assert!(overlap || got == expected, "{at}: {got}");
    }
    assert_eq!(
        fault(&new().header("b", &[1], 0, 32).bytes()),
        GgufFault::Overlap("a".into(), name())
    );
    assert_eq!(
        fault(&new().tensor("a", &[1], &[0.0]).bytes()),
        GgufFault::Duplicate("a".into())
    );
    assert_eq!(
        fault(&new().header("b", &[33], 2, 64).bytes()),
        GgufFault::Block {
            tensor: name(),
            row: 33,
            block: 32
        }
    );
    for number in [4, 5, 15, 31, u32::MAX] {
        let error = load_bytes(&new().header("b", &[32], number, 64).bytes()).unwrap_err();
        assert!(matches!(error, Error::TensorType { .. }), "{error}");
        assert!(error.to_string().contains("`b`") && error.to_string().contains("Q6_K"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// A law, not a table: whatever a few bytes become, the loader answers, and within bounds.
    #[test]
    fn no_mutation_of_a_file_panics_or_takes_memory_it_does_not_need(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = blocks();
        for (index, byte, in_header) in edits {
            // Most of the file is weights, where nothing can go wrong: half of the edits go to the header.
            let reach = if in_header { 2500 } else { bytes.len() };
            let at = index.index(reach);
            bytes[at] = byte;
        }
        if let Some(index) = cut {
            bytes.truncate(index.index(bytes.len()));
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        let growth = memory::peak_growth(|| {
            if let Err(error) = load(&path) {
                assert_eq!(error.kind(), ErrorKind::Input, "{error}");
                assert!(!error.to_string().is_empty());
            }
        });
        prop_assert!(growth < PEAK_BYTES, "{} bytes", growth);
    }
}
