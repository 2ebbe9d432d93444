//! Files that are whole or not there: a temporary name, a sync, a rename; and a checksum beside what must not rot.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::FileError;

/// Reads a whole file.
///
/// # Errors
/// [`FileError::Read`], with the path.
pub fn read_file(path: &Path) -> Result<Vec<u8>, FileError> {
    std::fs::read(path).map_err(|source| FileError::Read {
        path: path.into(),
        source,
    })
}

/// Writes `bytes` to `path` so that a reader, or a crash, sees the old content or the new, never a part.
///
/// The bytes go to a temporary name in the same directory, are synced, and are renamed over `path`; then the directory
/// is synced. A failure leaves what stood there before. Of a link it is the target that is replaced; a device or a pipe, which
/// holds nothing to replace, gets the bytes as they come.
///
/// # Errors
/// [`FileError::Write`], with the path; the temporary file is removed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let fail = |source| FileError::Write {
        path: path.into(),
        source,
    };
    if is_stream(path) {
        let mut stream = File::options().write(true).open(path).map_err(fail)?;
        return stream.write_all(bytes).map_err(fail);
    }
    let path = &behind_links(path);
    let temporary = temporary(path);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    if let Err(source) = written.and_then(|()| std::fs::rename(&temporary, path)) {
        // The first error is the one to report: the removal is a courtesy.
        let _ = std::fs::remove_file(&temporary);
        return Err(fail(source));
    }
    sync_directory(path.parent().unwrap_or(Path::new("."))).map_err(fail)
}

/// Finds out, before work that would be lost, whether [`write_atomic`] can write to `path`, and changes nothing.
///
/// # Errors
/// [`FileError::Write`], with the path.
pub fn check_writable(path: &Path) -> Result<(), FileError> {
    // To open a pipe would be to wait for its reader.
    if is_stream(path) {
        return Ok(());
    }
    let file = behind_links(path);
    let probed = match file.is_dir() {
        true => Err(std::io::ErrorKind::IsADirectory.into()),
        false => {
            let temporary = temporary(&file);
            File::create(&temporary).and_then(|_| std::fs::remove_file(&temporary))
        }
    };
    probed.map_err(|source| FileError::Write {
        path: path.into(),
        source,
    })
}

/// Whether `path` is there and neither a file nor a directory: a device or a pipe.
pub fn is_stream(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Whether both paths lead to one file, by whatever links.
pub fn same_file(one: &Path, other: &Path) -> bool {
    one.is_file() && other.is_file() && identity(one) == identity(other)
}

/// What two names of one file have in common, of a file that is there.
#[cfg(unix)]
fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let found = path.metadata().ok()?;
    Some((found.dev(), found.ino()))
}

/// The same where the system does not number its files: hard links are then files of their own.
#[cfg(not(unix))]
fn identity(path: &Path) -> Option<PathBuf> {
    path.canonicalize().ok()
}

/// The path that `path` leads to, whether something is there or not.
fn behind_links(path: &Path) -> PathBuf {
    let mut path = path.to_path_buf();
    // As many as Linux follows, which then calls them a circle.
    for _ in 0..40 {
        let Ok(target) = std::fs::read_link(&path) else {
            break;
        };
        path = path.with_file_name(target);
    }
    path
}

/// The name under which a file is written before it is whole.
fn temporary(path: &Path) -> PathBuf {
    beside(path, &format!(".{}.tmp", std::process::id()))
}

/// Removes what writers that were killed left in `directory` and below it: the temporary files of [`write_atomic`].
///
/// A courtesy: what cannot be removed stays. No writer may be at work there.
pub fn remove_temporaries(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => remove_temporaries(&path),
            Ok(kind) if kind.is_file() && is_temporary(&path) => {
                let _ = std::fs::remove_file(&path);
            }
            _ => {}
        }
    }
}

/// Whether a file has the name that [`write_atomic`] gives it before it is whole: `<name>.<process>.tmp`.
fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let process = name
        .and_then(|name| name.strip_suffix(".tmp"))
        .and_then(|name| name.rsplit_once('.'));
    process.is_some_and(|(_, process)| process.parse::<u32>().is_ok())
}

/// Syncs a directory, so that a rename inside it survives a power cut.
///
/// # Errors
/// What the system said.
pub fn sync_directory(directory: &Path) -> std::io::Result<()> {
    let directory = if directory.as_os_str().is_empty() {
        Path::new(".")
    } else {
        directory
    };
    File::open(directory)?.sync_all()
}

/// The BLAKE3 hash of `bytes`, in hexadecimal.
pub fn content_hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// A BLAKE3 hash of content that comes in pieces: [`content_hash`] of the pieces end to end.
///
/// # Examples
/// ```
/// use pivotal_core::{ContentHasher, content_hash};
/// let mut hasher = ContentHasher::default();
/// hasher.update(b"piv");
/// hasher.update(b"otal");
/// assert_eq!(hasher.finish(), content_hash(b"pivotal"));
/// ```
#[derive(Clone, Debug, Default)]
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    /// Adds a piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash, in hexadecimal.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

/// [`write_atomic`], with the content's hash in `<path>.blake3` beside it, written first.
///
/// # Errors
/// [`FileError::Write`].
pub fn write_checked(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    // Should the crash fall between the two renames, the new hash meets the old content and the reader refuses it:
    // writers of checkpoints therefore use a fresh directory and rename that last.
    write_atomic(&checksum_path(path), content_hash(bytes).as_bytes())?;
    write_atomic(path, bytes)
}

/// Reads what [`write_checked`] wrote.
///
/// # Errors
/// [`FileError::Damaged`] if the content does not match its checksum, [`FileError::Read`] if either file is missing.
pub fn read_checked(path: &Path) -> Result<Vec<u8>, FileError> {
    let bytes = read_file(path)?;
    let expected = String::from_utf8_lossy(&read_file(&checksum_path(path))?)
        .trim()
        .to_owned();
    let found = content_hash(&bytes);
    if expected != found {
        return Err(FileError::Damaged {
            path: path.into(),
            expected,
            found,
        });
    }
    Ok(bytes)
}

fn checksum_path(path: &Path) -> PathBuf {
    beside(path, ".blake3")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().map_or_else(OsString::new, OsString::from);
    name.push(suffix);
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checked_file_reads_back_and_one_flipped_bit_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights.bin");
        write_checked(&path, b"pivotal").unwrap();
        assert_eq!(read_checked(&path).unwrap(), b"pivotal");
        std::fs::write(&path, b"pivotak").unwrap();
        assert!(matches!(
            read_checked(&path),
            Err(FileError::Damaged { .. })
        ));
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_no_temporary_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("occupied");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("inside"), b"old").unwrap();
        assert!(matches!(
            write_atomic(&path, b"new"),
            Err(FileError::Write { .. })
        ));
        assert_eq!(std::fs::read(path.join("inside")).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_links_target_is_replaced_and_the_link_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir(path("below")).unwrap();
        std::os::unix::fs::symlink("below/file", path("near")).unwrap();
        std::os::unix::fs::symlink("near", path("far")).unwrap();
        for content in [b"new", b"old"] {
            check_writable(&path("far")).unwrap();
            write_atomic(&path("far"), content).unwrap();
            assert_eq!(std::fs::read(path("below/file")).unwrap(), content);
            assert!(path("far").is_symlink() && path("near").is_symlink());
        }
        assert!(same_file(&path("far"), &path("below/file")));
        std::fs::hard_link(path("below/file"), path("twin")).unwrap();
        assert!(same_file(&path("twin"), &path("near")));
        std::fs::write(path("other"), b"old").unwrap();
        assert!(!same_file(&path("other"), &path("near")));
        assert!(!same_file(&path("absent"), &path("absent")));
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_gets_the_bytes_and_stays_a_pipe() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        check_writable(&path).unwrap();
        let reader = std::thread::spawn({
            let path = path.clone();
            move || std::fs::read(path).unwrap()
        });
        write_atomic(&path, b"piped").unwrap();
        assert_eq!(reader.join().unwrap(), b"piped");
        assert!(is_stream(&path));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_found_without_writing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, b"old").unwrap();
        check_writable(&file).unwrap();
        check_writable(&directory.path().join("new")).unwrap();
        for bad in [
            directory.path(),
            &file.join("inside"),
            &directory.path().join("no/where"),
        ] {
            assert!(check_writable(bad).is_err(), "{}", bad.display());
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn temporaries_of_the_dead_are_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("below");
        std::fs::create_dir(&below).unwrap();
        let names = ["a.tmp", "b.12.tmp", "c.x.tmp", "d.12"];
        for name in names {
            std::fs::write(directory.path().join(name), name).unwrap();
            std::fs::write(below.join(name), name).unwrap();
        }
        remove_temporaries(directory.path());
        for name in names {
            let kept = name != "b.12.tmp";
            assert_eq!(directory.path().join(name).exists(), kept, "{name}");
            assert_eq!(below.join(name).exists(), kept, "{name}");
        }
    }

    #[test]
    fn the_hash_of_nothing_is_blake3s() {
        assert!(content_hash(b"").starts_with("af1349b9f5f9a1a6"));
    }
}
