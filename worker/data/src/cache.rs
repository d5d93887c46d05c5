//! Shards on local disk: a folder that several processes share, and that never grows over its bound.
//!
//! ```text
//! HASH.part     being fetched; whoever holds its lock writes it. Without a lock: left by a dead process
//! HASH.shard    whole; made by renaming a part whose hash was right. Who has it mapped holds a shared lock
//! room          locked while somebody looks for room or renames a part, which takes milliseconds: a listing is then true
//! ```
//!
//! Locks are the kernel's (`flock`): those of a killed process are gone with it. A part is made as long as it will be before
//! anything is fetched, so the sum of all lengths is what the folder holds and will hold. Room is made by removing whole
//! shards that nobody has mapped, the one used longest ago first.
//!
//! # Invariants
//! 1. The lengths of all files together stay within the bound.
//! 2. What is mapped stays whole, and on disk: it cannot be removed under its reader.
//! 3. Nothing half is taken for whole: what is mapped has been compared with its hash.
//! 4. A shard is fetched by one process of a host at a time.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use memmap2::Mmap;
use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_NOW, flock, futimens};

/// How long others may look for room.
const ROOM_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks at a lock that others hold.
const PAUSE: Duration = Duration::from_millis(1);

/// A folder of shards.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    folder: PathBuf,
    bytes_max: u64,
}

/// A shard, mapped; as long as it lives, nobody removes it.
#[derive(Debug)]
pub(crate) struct Mapped {
    map: Mmap,
    /// Holds the lock.
    _file: File,
}

impl Mapped {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// What came of asking for a shard to be fetched.
#[derive(Debug)]
pub(crate) enum Begin {
    /// Nobody else fetches it, and there is room.
    Part(Part),
    /// Another process or thread fetches it.
    Busy,
    /// It is there.
    There,
    /// All that is here is in use.
    Full,
}

/// A shard that is being fetched; removed where it is dropped.
#[derive(Debug)]
pub(crate) struct Part {
    file: File,
    path: PathBuf,
    cache: Cache,
    whole: PathBuf,
    renamed: bool,
}

impl Part {
    /// Starts again.
    pub(crate) fn restart(&mut self) -> io::Result<()> {
        io::Seek::rewind(&mut self.file)
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Makes it whole.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        let _room = self.cache.room()?;
        fs::rename(&self.path, &self.whole)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.renamed {
            // The lock is held until the file is closed, after this.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Cache {
    pub(crate) fn open(folder: PathBuf, bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { folder, bytes_max })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Bytes of all that is here, and room that is spoken for.
    pub(crate) fn held(&self) -> io::Result<u64> {
        let _room = self.room()?;
        let files = fs::read_dir(&self.folder)?.filter_map(|entry| entry.ok()?.metadata().ok());
        Ok(files.map(|file| file.len()).sum())
    }

    /// Maps a shard that is here and has this hash; one that has not is removed.
    pub(crate) fn find(&self, hash: &str, bytes: u64) -> io::Result<Option<Mapped>> {
        let path = self.whole(hash);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        // Whoever holds it alone is about to remove it.
        if !lock(&file, FlockOperation::NonBlockingLockShared)? || file.metadata()?.nlink() == 0 {
            return Ok(None);
        }
        if file.metadata()?.len() == bytes {
            // SAFETY: shards are written once, under the name of their hash, and never changed, nor removed while they are
            // locked; a process that changes one nevertheless can spoil tokens, whose values are checked where they are used.
            let map = unsafe { Mmap::map(&file)? };
            if blake3::hash(&map).to_hex().as_str() == hash {
                let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
                // Somebody else's file keeps its time, and is removed sooner than it should be.
                let _ = futimens(&file, &Timestamps { last_access: now, last_modification: now });
                return Ok(Some(Mapped { map, _file: file }));
            }
        }
        tracing::warn!(path = %path.display(), "a cached shard is damaged: it is fetched again");
        if is_at(&file, &path)? {
            remove(&path)?;
        }
        Ok(None)
    }

    /// Whether a shard seems to be here.
    pub(crate) fn has(&self, hash: &str) -> bool {
        self.whole(hash).exists()
    }

    /// Makes room for a shard, and lets the caller fetch it. Shards of `keep` make no room, unless the caller insists.
    pub(crate) fn begin(
        &self,
        hash: &str,
        bytes: u64,
        keep: &BTreeSet<String>,
        insist: bool,
    ) -> io::Result<Begin> {
        let (path, whole) = (self.folder.join(format!("{hash}.part")), self.whole(hash));
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path)?;
        if !lock(&file, FlockOperation::NonBlockingLockExclusive)? {
            return Ok(Begin::Busy);
        }
        if !is_at(&file, &path)? {
            return Ok(Begin::Busy);
        }
        let part = Part { file, path, cache: self.clone(), whole, renamed: false };
        if part.whole.exists() {
            return Ok(Begin::There);
        }
        let room = self.room()?;
        part.file.set_len(0)?;
        let fits = self.evict(bytes, keep)? || insist && self.evict(bytes, &BTreeSet::new())?;
        if fits {
            part.file.set_len(bytes)?;
        }
        drop(room);
        Ok(if fits { Begin::Part(part) } else { Begin::Full })
    }

    fn whole(&self, hash: &str) -> PathBuf {
        self.folder.join(format!("{hash}.shard"))
    }

    /// The lock under which room is looked for.
    fn room(&self) -> io::Result<File> {
        let path = self.folder.join("room");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        let deadline = Instant::now() + ROOM_TIMEOUT;
        while !lock(&file, FlockOperation::NonBlockingLockExclusive)? {
            if Instant::now() > deadline {
                let text = "another process has looked for room for too long";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(file)
    }

    /// Removes what nobody uses until `bytes` more fit; the caller holds the lock.
    fn evict(&self, bytes: u64, keep: &BTreeSet<String>) -> io::Result<bool> {
        let (mut total, mut idle) = (bytes, Vec::new());
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            // It may just have been renamed.
            let Ok(found) = fs::metadata(&path) else { continue };
            total += found.len();
            let kept =
                path.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| keep.contains(stem));
            let used = match path.extension().and_then(|extension| extension.to_str()) {
                // Of the dead; that of the living is locked.
                Some("part") => SystemTime::UNIX_EPOCH,
                Some("shard") if !kept => found.modified()?,
                _ => continue,
            };
            idle.push((used, path, found.len()));
        }
        idle.sort();
        for (_, path, length) in idle {
            if total <= self.bytes_max {
                break;
            }
            if remove_unlocked(&path)? {
                total -= length;
            }
        }
        Ok(total <= self.bytes_max)
    }
}

/// Removes a file, unless somebody holds its lock.
fn remove_unlocked(path: &Path) -> io::Result<bool> {
    let Ok(file) = File::open(path) else { return Ok(false) };
    Ok(lock(&file, FlockOperation::NonBlockingLockExclusive)? && is_at(&file, path)? && remove(path).is_ok())
}

/// Whether this file, once opened there, is there still: it may have been renamed or removed meanwhile.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path).map(|found| found.ino()).ok() == Some(file.metadata()?.ino()))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether the lock could be had.
fn lock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 100;

    fn fetch(cache: &Cache, content: u8) -> Option<String> {
        let bytes = [content; BYTES as usize];
        let hash = blake3::hash(&bytes).to_hex().to_string();
        let Begin::Part(mut part) = cache.begin(&hash, BYTES, &BTreeSet::new(), true).unwrap() else {
            return None;
        };
        part.write(&bytes).unwrap();
        part.finish().unwrap();
        Some(hash)
    }

    #[test]
    fn what_is_mapped_makes_no_room_and_what_is_not_does() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("shards"), 2 * BYTES + BYTES / 2).unwrap();
        let mut mapped: Vec<Mapped> = [1, 2]
            .map(|content| cache.find(&fetch(&cache, content).unwrap(), BYTES).unwrap().unwrap())
            .into();
        assert_eq!(fetch(&cache, 3), None, "both are in use");
        assert_eq!(cache.held().unwrap(), 2 * BYTES, "and nothing is left of the attempt");
        drop(mapped.pop());
        let third = fetch(&cache, 3).unwrap();
        assert_eq!(cache.held().unwrap(), 2 * BYTES);
        assert!(cache.has(&third) && mapped[0].bytes() == [1; BYTES as usize]);
    }

    #[test]
    fn what_is_kept_makes_room_only_for_who_insists() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("shards"), BYTES).unwrap();
        let keep = BTreeSet::from([fetch(&cache, 1).unwrap()]);
        let other = "ab".repeat(32);
        assert!(matches!(cache.begin(&other, BYTES, &keep, false).unwrap(), Begin::Full));
        assert!(matches!(cache.begin(&other, BYTES, &keep, true).unwrap(), Begin::Part(_)));
    }
}
