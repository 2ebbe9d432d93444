//! TensorBoard event files: TFRecord framing, and the few protobuf fields of a scalar summary.
//!
//! A record is its length (u64), the length's checksum, the bytes and theirs, all little-endian; the checksum is CRC-32C,
//! rotated and shifted by a constant. The bytes are an `Event`: `wall_time` (1), `step` (2), `file_version` (3) and
//! `summary` (5), which holds a `value` (1) a scalar, of `tag` (1) and `simple_value` (2).
//!
//! Reference: `tensorboard` 2.21's own reader and protobufs (`scripts/check_tensorboard.py`).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use pivotal_core::{read_file, write_atomic};
use serde_json::Value;

use crate::error::Result;
use crate::run::write_error;

/// TensorBoard knows its files by `tfevents` in their name.
const FILE: &str = "events.out.tfevents.pivotal";
const VERSION: &str = "brain.Event:2";
/// Length and its checksum before the bytes, their checksum after them.
const HEADER: usize = 12;
const FOOTER: usize = 4;

/// The event file of a run.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Opens the event file in `directory`, which is made; a new one begins with its version.
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory).map_err(|source| write_error(directory, source))?;
        let path = directory.join(FILE);
        if !path.exists() {
            write_atomic(&path, &record(&version_event(now())))?;
        }
        let file = append(&path)?;
        Ok(Self { path, file })
    }

    /// Adds the numbers of `metrics`, an object; those in objects and lists within it under `outer/inner`.
    pub(crate) fn log(&mut self, step: u64, metrics: &Value) -> Result<()> {
        let mut scalars = Vec::new();
        collect("", metrics, &mut scalars);
        let bytes = record(&scalar_event(now(), step, &scalars));
        let written = self.file.write_all(&bytes);
        written.map_err(|source| write_error(&self.path, source))
    }

    /// Forgets what was logged after `step`, and what follows a record that is torn or damaged.
    pub(crate) fn rewind(&mut self, step: u64) -> Result<()> {
        let bytes = read_file(&self.path)?;
        let mut kept = Vec::with_capacity(bytes.len());
        let mut rest = &bytes[..];
        while let Some((event, record_len)) = first_record(rest) {
            let (record, after) = rest.split_at(record_len);
            if step_of_event(event).is_some_and(|logged| logged <= step) {
                kept.extend_from_slice(record);
            }
            rest = after;
        }
        if kept.is_empty() {
            kept = record(&version_event(now()));
        }
        if kept != bytes {
            write_atomic(&self.path, &kept)?;
            self.file = append(&self.path)?;
        }
        Ok(())
    }

    /// Writes what has been logged to the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        let synced = self.file.sync_data();
        synced.map_err(|source| write_error(&self.path, source))
    }
}

fn append(path: &Path) -> Result<File> {
    let file = OpenOptions::new().append(true).open(path);
    file.map_err(|source| write_error(path, source))
}

/// Seconds since 1970; what TensorBoard's relative axis is made of, and no part of the run.
fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

fn collect(prefix: &str, value: &Value, scalars: &mut Vec<(String, f32)>) {
    match value {
        Value::Number(number) => {
            scalars.extend(
                number
                    .as_f64()
                    .map(|number| (prefix.to_owned(), number as f32)),
            );
        }
        Value::Object(fields) => {
            for (key, value) in fields {
                let tag = match prefix.is_empty() {
                    true => key.clone(),
                    false => format!("{prefix}/{key}"),
                };
                collect(&tag, value, scalars);
            }
        }
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                collect(&format!("{prefix}/{index}"), value, scalars);
            }
        }
        _ => {}
    }
}

fn version_event(wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time);
    put_bytes(&mut event, 3, VERSION.as_bytes());
    event
}

fn scalar_event(wall_time: f64, step: u64, scalars: &[(String, f32)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in scalars {
        let mut scalar = Vec::new();
        put_bytes(&mut scalar, 1, tag.as_bytes());
        put_varint(&mut scalar, key(2, FOUR_BYTES));
        scalar.extend(value.to_le_bytes());
        put_bytes(&mut summary, 1, &scalar);
    }
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time);
    put_varint(&mut event, key(2, VARINT));
    put_varint(&mut event, step);
    put_bytes(&mut event, 5, &summary);
    event
}

const VARINT: u64 = 0;
const EIGHT_BYTES: u64 = 1;
const BYTES: u64 = 2;
const FOUR_BYTES: u64 = 5;

fn key(field: u64, wire_type: u64) -> u64 {
    field << 3 | wire_type
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(out, key(field, EIGHT_BYTES));
    out.extend(value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(out, key(field, BYTES));
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// The step of an event, 0 if it has none (the version's); `None` if these bytes are no event.
fn step_of_event(mut event: &[u8]) -> Option<u64> {
    let mut step = 0;
    while !event.is_empty() {
        let field = take_varint(&mut event)?;
        let skip = match field & 7 {
            VARINT => {
                let value = take_varint(&mut event)?;
                if field >> 3 == 2 {
                    step = value;
                }
                0
            }
            EIGHT_BYTES => 8,
            FOUR_BYTES => 4,
            BYTES => usize::try_from(take_varint(&mut event)?).ok()?,
            _ => return None,
        };
        event = event.get(skip..)?;
    }
    Some(step)
}

/// One record: the event within its frame.
fn record(event: &[u8]) -> Vec<u8> {
    let len = (event.len() as u64).to_le_bytes();
    let mut record = len.to_vec();
    record.extend(masked_crc(&len).to_le_bytes());
    record.extend_from_slice(event);
    record.extend(masked_crc(event).to_le_bytes());
    record
}

/// The event of the first record, and the record's length; none if it is torn or its checksums do not hold.
fn first_record(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    let (len_crc, rest) = rest.split_first_chunk::<4>()?;
    if masked_crc(len) != u32::from_le_bytes(*len_crc) {
        return None;
    }
    let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
    let (event, rest) = rest.split_at_checked(len)?;
    let crc = rest.first_chunk::<4>()?;
    let whole = masked_crc(event) == u32::from_le_bytes(*crc);
    whole.then_some((event, HEADER + len + FOOTER))
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: a step writes some hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn steps(path: &Path) -> Vec<u64> {
        let bytes = std::fs::read(path.join(FILE)).unwrap();
        let (mut rest, mut steps) = (&bytes[..], Vec::new());
        while let Some((event, len)) = first_record(rest) {
            steps.push(step_of_event(event).unwrap());
            rest = &rest[len..];
        }
        assert!(rest.is_empty(), "{} bytes are no record", rest.len());
        steps
    }

    #[test]
    fn the_checksum_is_that_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    /// Printed by `scripts/check_tensorboard.py --bytes`.
    #[test]
    fn records_are_the_bytes_that_tensorboard_writes() {
        let version = record(&version_event(1_700_000_000.25));
        assert_eq!(hex(&version), VERSION_BYTES);
        let metrics = serde_json::json!({
            "loss": std::f64::consts::LN_2,
            "kl": { "k1": -0.125 },
            "name": "text",
            "none": null,
        });
        let mut scalars = Vec::new();
        collect("", &metrics, &mut scalars);
        scalars.sort_by(|a, b| a.0.cmp(&b.0));
        let event = record(&scalar_event(1_700_000_001.5, 300, &scalars));
        assert_eq!(hex(&event), EVENT_BYTES);
    }

    #[test]
    fn numbers_within_lists_and_objects_have_tags_and_texts_have_none() {
        let metrics = serde_json::json!({
            "agreement": { "f1": 0.5, "recall": null },
            "kept": [0.25, null, 1.0],
            "warnings": ["a text"],
        });
        let mut scalars = Vec::new();
        collect("", &metrics, &mut scalars);
        let tag = |tag: &str, value| (tag.to_owned(), value);
        let expected = [
            tag("agreement/f1", 0.5),
            tag("kept/0", 0.25),
            tag("kept/2", 1.0),
        ];
        assert_eq!(scalars, expected);
    }

    const VERSION_BYTES: &str =
        "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9";
    const EVENT_BYTES: &str = "290000000000000037ff5f000900006040fc54d94110ac022a1b0a0c0a056b6c2f6b3115000000be0a0b0a046c6f7373151872313f8c8e2568";

    #[test]
    fn rewinding_forgets_later_steps_and_torn_records() {
        let directory = tempfile::tempdir().unwrap();
        let mut events = EventFile::open(directory.path()).unwrap();
        let metrics = serde_json::json!({ "loss": 0.5 });
        for step in 1..=200 {
            events.log(step, &metrics).unwrap();
        }
        drop(events);
        let path = directory.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let mut events = EventFile::open(directory.path()).unwrap();
        events.rewind(199).unwrap();
        assert_eq!(steps(directory.path()), (0..=199).collect::<Vec<_>>());
        events.rewind(150).unwrap();
        events.log(151, &metrics).unwrap();
        assert_eq!(steps(directory.path()), (0..=151).collect::<Vec<_>>());

        let mut damaged = std::fs::read(&path).unwrap();
        damaged[40] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        events.rewind(151).unwrap();
        assert_eq!(steps(directory.path()), [0]);
    }
}
