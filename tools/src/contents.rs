//! What a disk holds before it becomes a replica.
//!
//! Kagami's own metadata is looked for here. Everything else is found by util-linux's `wipefs`,
//! which knows the signatures of some hundred file systems, partition tables, volume managers and
//! RAIDs, those with a bad checksum and those at the end of the disk among them. It is asked to
//! list, never to write, and is handed the open and locked disk as its standard input: a path could
//! name another one by then.

use crate::store::Store;
use mirror_core::config::{Config, Mirror, Side};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::meta::superblock::{SlotError, Superblock};
use mirror_core::meta::{HEADER_SIZE, META_BLOCK, SLOTS};
use serde_json::Value;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The most that is shown of a label.
const LONGEST_LABEL: usize = 40;

/// What libblkid takes for empty where it cannot be read, so it is read first: both ends.
const PROBED: u64 = 1 << 20;

/// Where administrators' programs are, whatever the search path of the one who asks.
const SYSTEM_DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// What kind of thing a signature is of, in libblkid's classes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Usage {
    /// A file system.
    FileSystem,
    /// A partition table.
    PartitionTable,
    /// A member of a RAID or of a volume group.
    Raid,
    /// An encrypted volume.
    Crypto,
    /// Swap and all the rest.
    Other,
}

/// One signature on a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signature {
    /// libblkid's name of it, as in `lsblk --fs` and `wipefs`: letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// What it is of.
    pub usage: Usage,
    /// The label, made printable.
    pub label: Option<String>,
    /// Where its magic bytes are.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match self.usage {
            Usage::FileSystem => write!(f, "a file system ({name}"),
            Usage::PartitionTable => write!(f, "a partition table ({name}"),
            Usage::Raid => write!(f, "a member of a RAID or volume group ({name}"),
            Usage::Crypto => write!(f, "an encrypted volume ({name}"),
            Usage::Other => write!(f, "a signature ({name}"),
        }?;
        match &self.label {
            Some(label) => write!(f, ", labelled `{label}`)"),
            None => f.write_str(")"),
        }
    }
}

/// Finds the program that probes.
#[derive(Debug)]
pub struct Prober {
    directories: Vec<PathBuf>,
}

impl Prober {
    /// In the system's directories, then on the search path.
    pub fn of_system() -> Prober {
        let mut directories: Vec<PathBuf> = SYSTEM_DIRECTORIES.map(PathBuf::from).into();
        let search = std::env::var_os("PATH").unwrap_or_default();
        directories.extend(std::env::split_paths(&search).filter(|it| it.is_absolute()));
        Prober { directories }
    }

    /// Every signature on a store. What cannot be probed is never taken for empty.
    pub fn signatures(&self, store: &Store) -> Result<Vec<Signature>, Refusal> {
        let disk = store.path().display();
        let unknown = |what: String| {
            Refusal::new(
                ErrorId::StoreNotProbed,
                format!("what {disk} holds is not known: {what}"),
            )
        };
        let ends = store.size.min(PROBED);
        store.read(0, ends as usize)?;
        store.read(store.size - ends, ends as usize)?;

        let program = self.program().ok_or_else(|| {
            unknown("there is no program wipefs; install the package util-linux".to_owned())
        })?;
        let answer = run(&program, store).map_err(|what| unknown(format!("wipefs: {what}")))?;
        let inside = |it: &Signature| {
            it.offset
                .checked_add(it.len)
                .is_some_and(|end| end <= store.size)
        };
        parse(&answer)
            .filter(|found| found.iter().all(inside))
            .ok_or_else(|| {
                let remedy = "install util-linux 2.31 or later";
                unknown(format!("wipefs answers in another form; {remedy}"))
            })
    }

    fn program(&self) -> Option<PathBuf> {
        let mut candidates = self.directories.iter().map(|it| it.join("wipefs"));
        candidates.find(|candidate| candidate.is_file())
    }
}

fn run(program: &Path, store: &Store) -> Result<Vec<u8>, String> {
    let ended = Command::new(program)
        .args(["--no-act", "--json"])
        .args(["--output", "OFFSET,LENGTH,TYPE,USAGE,LABEL"])
        .arg("/proc/self/fd/0")
        // Some of its environment changes what it does: it could wait for the lock held here.
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(store.as_input().map_err(|error| error.to_string())?)
        .output()
        .map_err(|error| error.to_string())?;
    if ended.status.success() {
        return Ok(ended.stdout);
    }
    let complaint = String::from_utf8_lossy(&ended.stderr);
    let first = complaint.lines().next().unwrap_or("no reason given");
    Err(format!("{}: {}", ended.status, printable(first, 200)))
}

/// `None` for anything but the whole expected form: what was half understood is not understood.
fn parse(answer: &[u8]) -> Option<Vec<Signature>> {
    if answer.iter().all(u8::is_ascii_whitespace) {
        // What some versions say of an empty disk.
        return Some(Vec::new());
    }
    // Labels are passed on as they are, in whatever encoding.
    let answer: Value = serde_json::from_str(&String::from_utf8_lossy(answer)).ok()?;
    let found = answer.get("signatures")?.as_array()?;
    found.iter().map(signature).collect()
}

fn signature(found: &Value) -> Option<Signature> {
    let text = |key| found.get(key).and_then(Value::as_str);
    let name = text("type")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return None;
    }
    let usage = match text("usage") {
        Some("filesystem") => Usage::FileSystem,
        Some("partition-table") => Usage::PartitionTable,
        Some("raid") => Usage::Raid,
        Some("crypto") => Usage::Crypto,
        _ => Usage::Other,
    };
    Some(Signature {
        name: name.to_owned(),
        usage,
        label: text("label").map(|label| printable(label, LONGEST_LABEL)),
        offset: number(found.get("offset")?)?,
        len: number(found.get("length")?)?,
    })
}

/// A number, or a text of one; offsets are in hexadecimal.
fn number(value: &Value) -> Option<u64> {
    let text = match value {
        Value::String(text) => text,
        other => return other.as_u64(),
    };
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Bytes from a disk do not get to drive the operator's terminal.
fn printable(text: &str, longest: usize) -> String {
    let short: String = text.chars().take(longest).collect();
    short.escape_debug().to_string()
}

/// Whose replica a disk is to be.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// The cluster's name.
    pub cluster: &'a str,
    /// The mirror's.
    pub mirror: &'a str,
    /// The node's.
    pub node: &'a str,
}

impl<'a> Identity<'a> {
    /// Of a side of a mirror.
    pub fn of(config: &'a Config, mirror: &'a Mirror, side: &'a Side) -> Identity<'a> {
        Identity {
            cluster: &config.cluster,
            mirror: &mirror.name,
            node: &side.node,
        }
    }

    fn owns(self, superblock: &Superblock) -> bool {
        superblock.cluster == self.cluster
            && superblock.mirror_name == self.mirror
            && superblock.node == self.node
    }
}

/// Kagami metadata on a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Metadata {
    /// Of this very replica: mirror, cluster and node.
    Own(Box<Superblock>),
    /// A superblock that does not verify: of whom is not known.
    Damaged(SlotError),
    /// Of another mirror, cluster or node.
    Foreign(Box<Superblock>),
    /// Of a version that this build cannot read.
    Version(u32),
}

impl Metadata {
    /// Where several are found, the one that is to be met with the most care.
    fn care(&self) -> u8 {
        match self {
            Metadata::Own(_) => 0,
            Metadata::Damaged(_) => 1,
            Metadata::Foreign(_) => 2,
            Metadata::Version(_) => 3,
        }
    }
}

/// The metadata on a store, in either place that metadata can have on it: an internal replica's at
/// the tail, an external one's at the beginning.
pub fn metadata(store: &Store, identity: Identity<'_>) -> Result<Option<Metadata>, Refusal> {
    let tail = (store.size / META_BLOCK * META_BLOCK).checked_sub(HEADER_SIZE);
    let mut found = Vec::new();
    for place in [Some(0), tail].into_iter().flatten() {
        let mut slots = Vec::new();
        for slot in 0..SLOTS {
            let offset = place + slot * META_BLOCK;
            if offset + META_BLOCK <= store.size {
                let bytes = store.read(offset, META_BLOCK as usize)?;
                slots.push(Superblock::parse(&bytes).map(|it| it.untrusted().clone()));
            }
        }
        found.extend(judge(slots, identity));
    }
    Ok(found.into_iter().max_by_key(Metadata::care))
}

/// What a pair of slots is. One that verifies speaks for one that was torn.
fn judge(slots: Vec<Result<Superblock, SlotError>>, identity: Identity<'_>) -> Option<Metadata> {
    let mut newest: Option<Superblock> = None;
    let mut damage = None;
    for slot in slots {
        match slot {
            Ok(superblock) if !identity.owns(&superblock) => {
                return Some(Metadata::Foreign(Box::new(superblock)));
            }
            Ok(superblock) => {
                newest = newest
                    .into_iter()
                    .chain([superblock])
                    .max_by_key(|it| it.sequence);
            }
            Err(SlotError::Absent) => {}
            Err(SlotError::Version(version)) => return Some(Metadata::Version(version)),
            Err(error) => damage = Some(error),
        }
    }
    newest
        .map(|own| Metadata::Own(Box::new(own)))
        .or(damage.map(Metadata::Damaged))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_core::types::ReplicaId;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    const ME: Identity<'static> = Identity {
        cluster: "c",
        mirror: "r0",
        node: "a",
    };

    fn named(cluster: &str, mirror: &str, node: &str, sequence: u64) -> Superblock {
        Superblock {
            cluster: cluster.to_owned(),
            mirror_name: mirror.to_owned(),
            node: node.to_owned(),
            sequence,
            ..Superblock::unborn(ReplicaId(1), 1 << 20)
        }
    }

    #[test]
    fn whose_metadata_it_is() {
        let own = || Ok(named("c", "r0", "a", 4));
        let torn = || Err(SlotError::Checksum);
        let none = || Err(SlotError::Absent);
        let newer = || Err(SlotError::Version(2));
        for (slots, care) in [
            ([none(), none()], None),
            ([own(), none()], Some(0)),
            ([torn(), own()], Some(0)),
            ([torn(), none()], Some(1)),
            ([own(), Ok(named("c", "r1", "a", 5))], Some(2)),
            ([Ok(named("d", "r0", "a", 1)), none()], Some(2)),
            ([none(), Ok(named("c", "r0", "b", 1))], Some(2)),
            ([own(), newer()], Some(3)),
        ] {
            let found = judge(slots.clone().into(), ME);
            assert_eq!(found.as_ref().map(Metadata::care), care, "{slots:?}");
        }
        let found = judge(vec![own(), Ok(named("c", "r0", "a", 9))], ME);
        assert!(matches!(found, Some(Metadata::Own(newest)) if newest.sequence == 9));
    }

    #[test]
    fn answers_of_wipefs() {
        let said = br#"{"signatures": [
            {"offset":"0x438", "length":2, "type":"ext4", "usage":"filesystem",
             "label":"my\u001b[2J"},
            {"offset":"0x200", "length":"8", "type":"gpt", "usage":"partition-table",
             "label":null}]}"#;
        let found = parse(said).unwrap();
        assert_eq!(
            found[0].to_string(),
            "a file system (ext4, labelled `my\\u{1b}[2J`)"
        );
        assert_eq!((found[0].offset, found[0].len), (0x438, 2));
        assert_eq!(found[1].to_string(), "a partition table (gpt)");
        assert_eq!((found[1].offset, found[1].len), (0x200, 8));
        let latin = b"{\"signatures\": [{\"offset\":\"0x0\",\"length\":1,\"type\":\"ext4\",\
                      \"usage\":\"filesystem\",\"label\":\"\xe9\"}]}";
        let label = parse(latin).unwrap().remove(0).label;
        assert_eq!(label.as_deref(), Some("\u{fffd}"));
        for empty in [&b""[..], b"\n", br#"{"signatures": [ ]}"#] {
            assert_eq!(parse(empty), Some(Vec::new()));
        }
        for strange in [
            &b"DEVICE OFFSET TYPE"[..],
            b"{}",
            br#"{"signatures": {}}"#,
            br#"{"signatures": [{}]}"#,
            br#"{"signatures": [{"offset":"0x0","length":1,"type":"a b"}]}"#,
            br#"{"signatures": [{"offset":"far","length":1,"type":"ext4"}]}"#,
            br#"{"signatures": [{"offset":"0x0","length":-1,"type":"ext4"}]}"#,
        ] {
            assert_eq!(parse(strange), None);
        }
    }

    /// A store, and a prober whose `wipefs` is this script; none without one.
    fn refusal(script: Option<&str>) -> Refusal {
        let dir = TempDir::new().unwrap();
        if let Some(script) = script {
            let program = dir.path().join("wipefs");
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let prober = Prober {
            directories: vec!["/nonexistent".into(), dir.path().to_owned()],
        };
        let store = Store::create(&dir.path().join("disk"), 1 << 20).unwrap();
        prober.signatures(&store).unwrap_err()
    }

    #[test]
    fn what_cannot_be_probed_is_not_taken_for_empty() {
        for (script, part) in [
            (None, "install the package util-linux"),
            (
                Some("echo bad option >&2; exit 1"),
                "exit status: 1: bad option",
            ),
            (Some("echo DEVICE; exit 0"), "answers in another form"),
            (Some("kill -9 $$"), "signal: 9"),
        ] {
            let refusal = refusal(script);
            assert_eq!(refusal.id, ErrorId::StoreNotProbed, "{refusal}");
            assert!(refusal.message.contains(part), "{refusal}");
            assert!(
                refusal.message.contains("/disk holds is not known"),
                "{refusal}"
            );
        }
    }
}
