//! How files store elements: floats, and GGUF's block formats, expanded to `f32` in the order of operations of the `gguf` Python
//! package, so bit for bit.
//!
//! Block layouts: ggml, `ggml-common.h` and `ggml-quants.c`.

use half::{bf16, f16};

/// How a tensor's elements are stored: the first three in safetensors too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// The types that are read, for messages.
pub(super) const STORAGES: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K";

/// Elements in a block of the K formats.
const SUPER: usize = 256;
/// Elements in a block of the others.
const SMALL: usize = 32;

impl Storage {
    /// The type with ggml's number.
    pub(super) fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// Elements and bytes of one block.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (SMALL, 2 + 16),
            Self::Q4_1 => (SMALL, 2 + 2 + 16),
            Self::Q5_0 => (SMALL, 2 + 4 + 16),
            Self::Q5_1 => (SMALL, 2 + 2 + 4 + 16),
            Self::Q8_0 => (SMALL, 2 + 32),
            Self::Q4K => (SUPER, 2 + 2 + 12 + 128),
            Self::Q5K => (SUPER, 2 + 2 + 12 + 32 + 128),
            Self::Q6K => (SUPER, 128 + 64 + 16 + 2),
        }
    }

    /// The number of elements in the whole blocks of so many bytes.
    pub(super) fn elements(self, data_bytes: usize) -> usize {
        let (elements, bytes) = self.block();
        data_bytes / bytes * elements
    }

    /// The elements of whole blocks.
    pub(super) fn expand(self, data: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => floats(data, f32::from_le_bytes),
            Self::F16 => floats(data, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Self::Bf16 => floats(data, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            Self::Q4_0 => self.blocks(data, |out, block| {
                small(out, half_at(block, 0), None, &block[2..], |_| 0, 8);
            }),
            Self::Q4_1 => self.blocks(data, |out, block| {
                let minimum = Some(half_at(block, 2));
                small(out, half_at(block, 0), minimum, &block[4..], |_| 0, 0);
            }),
            Self::Q5_0 => self.blocks(data, |out, block| {
                let fifth = fifth_bits(&block[2..6]);
                small(out, half_at(block, 0), None, &block[6..], fifth, 16);
            }),
            Self::Q5_1 => self.blocks(data, |out, block| {
                let (minimum, fifth) = (Some(half_at(block, 2)), fifth_bits(&block[4..8]));
                small(out, half_at(block, 0), minimum, &block[8..], fifth, 0);
            }),
            Self::Q8_0 => self.blocks(data, |out, block| {
                let scale = half_at(block, 0);
                for (value, &byte) in out.iter_mut().zip(&block[2..]) {
                    *value = f32::from(byte.cast_signed()) * scale;
                }
            }),
            Self::Q4K => self.blocks(data, |out, block| {
                super_blocks(out, block, &block[16..], |_, _| 0);
            }),
            Self::Q5K => self.blocks(data, |out, block| {
                let high = &block[16..48];
                super_blocks(out, block, &block[48..], |group, index| {
                    (high[index] >> group & 1) << 4
                });
            }),
            Self::Q6K => self.blocks(data, six_bits),
        }
    }

    /// The elements of blocks, each of which `expand` writes.
    fn blocks(self, data: &[u8], expand: impl Fn(&mut [f32], &[u8])) -> Vec<f32> {
        let (elements, bytes) = self.block();
        let mut values = vec![0.0; self.elements(data.len())];
        for (out, block) in values
            .chunks_exact_mut(elements)
            .zip(data.chunks_exact(bytes))
        {
            expand(out, block);
        }
        values
    }
}

fn floats<const N: usize>(data: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (numbers, _) = data.as_chunks();
    numbers.iter().map(|&bytes| convert(bytes)).collect()
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 32 four-bit numbers, low nibbles first, each with a fifth bit; then scale, less `offset`, plus `minimum`.
fn small(
    out: &mut [f32],
    scale: f32,
    minimum: Option<f32>,
    nibbles: &[u8],
    fifth: impl Fn(usize) -> u8,
    offset: i8,
) {
    for (index, value) in out.iter_mut().enumerate() {
        let byte = nibbles[index % 16];
        let low = if index < 16 { byte & 15 } else { byte >> 4 };
        let number = f32::from((low | fifth(index) << 4).cast_signed() - offset);
        *value = match minimum {
            None => scale * number,
            Some(minimum) => scale * number + minimum,
        };
    }
}

fn fifth_bits(bytes: &[u8]) -> impl Fn(usize) -> u8 + '_ {
    |index| bytes[index / 8] >> (index % 8) & 1
}

/// Q4_K and Q5_K: eight groups of 32 with six-bit scales and minima; `high` gives a number's bits above the fourth.
fn super_blocks(out: &mut [f32], block: &[u8], nibbles: &[u8], high: impl Fn(usize, usize) -> u8) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for (group, values) in out.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_minimum) = if group < 4 {
            (packed[group] & 63, packed[group + 4] & 63)
        } else {
            let (low, mid, both) = (packed[group - 4], packed[group], packed[group + 4]);
            (both & 15 | low >> 2 & 48, both >> 4 | mid >> 2 & 48)
        };
        let scale = scale * f32::from(group_scale);
        let minimum = minimum * f32::from(group_minimum);
        let bytes = &nibbles[group / 2 * 32..][..32];
        for (index, (value, &byte)) in values.iter_mut().zip(bytes).enumerate() {
            let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            *value = scale * f32::from(low | high(group, index)) - minimum;
        }
    }
}

/// Q6_K: four low bits, two high bits, less 32; sixteen groups of 16 with signed eight-bit scales.
fn six_bits(out: &mut [f32], block: &[u8]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, _) = rest.split_at(16);
    let scale = half_at(block, 208);
    for (index, value) in out.iter_mut().enumerate() {
        let (half, within) = (index / 128, index % 128);
        let low_byte = low[half * 64 + within % 64];
        let low = if within < 64 {
            low_byte & 15
        } else {
            low_byte >> 4
        };
        let high = high[half * 32 + within % 32] >> (2 * (within / 32)) & 3;
        let number = (low | high << 4).cast_signed() - 32;
        *value = scale * f32::from(scales[index / 16].cast_signed()) * f32::from(number);
    }
}
