//! `kagami dump-metadata`: what this node's disk knows of its mirror.

use crate::context::Context;
use crate::human;
use crate::options::Place;
use crate::output;
use crate::store::{Access, Store, metadata_place};
use clap::Args;
use mirror_core::config::{Metadata, Side};
use mirror_core::error::{ErrorId, Refusal};
use mirror_core::limits::EXTENT;
use mirror_core::meta::superblock::{SlotError, TrustError};
use mirror_core::meta::{self, Description, ImageError};

/// Print this node's metadata of a mirror, while its daemon does not hold the disk.
///
/// Prints superblocks, history, activity log and dirty blocks of this node's disk, read from the
/// disk itself. Refuses while a daemon holds the disk; take the mirror down first.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kagami dump-metadata r0
  kagami dump-metadata r0 --json")]
pub struct DumpArgs {
    /// Which mirror [default: the only one of this node].
    pub mirror: Option<String>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs the verb.
pub fn run(place: &Place, args: &DumpArgs) -> Result<(), Refusal> {
    let context = Context::load(place)?;
    let mirror = context.mirror(args.mirror.as_deref())?;
    let description = describe(context.side(mirror))?;
    if args.json {
        let json = serde_json::to_string_pretty(&description).map_err(|error| {
            Refusal::new(
                ErrorId::Internal,
                format!("the metadata does not fit JSON: {error}"),
            )
        })?;
        output::line(json);
    } else {
        output::line(text(&description));
    }
    Ok(())
}

/// Reads and describes a side's metadata.
pub fn describe(side: &Side) -> Result<Description, Refusal> {
    let data = Store::open(&side.disk, Access::Read)?;
    let external = match &side.metadata {
        Metadata::Internal => None,
        Metadata::External(path) => Some(Store::open(path, Access::Read)?),
    };
    let store = external.as_ref().unwrap_or(&data);
    let read = |offset, len| store.read(offset, len);
    meta::describe(read, data.size, metadata_place(side)).map_err(|error| {
        let disk = side.disk.display();
        let (id, remedy) = match &error {
            ImageError::Read(refusal) => return refusal.clone(),
            ImageError::Layout(_) => (ErrorId::StoreTooSmall, "is this the right disk?"),
            ImageError::Trust(TrustError::Shrunk { .. }) => {
                (ErrorId::StoreTooSmall, "give the disk its old size back")
            }
            ImageError::Trust(TrustError::NoSlot(SlotError::Absent, SlotError::Absent)) => (
                ErrorId::MetadataMissing,
                "run `kagami create` first, or check the path",
            ),
            ImageError::Trust(TrustError::NoSlot(SlotError::Version(_), _))
            | ImageError::Trust(TrustError::NoSlot(_, SlotError::Version(_))) => (
                ErrorId::MetadataVersion,
                "use the version of Kagami that wrote it",
            ),
            ImageError::Trust(TrustError::NoSlot(..)) => (
                ErrorId::MetadataDamaged,
                "run `kagami create --overwrite kagami` and let the peer copy its data here",
            ),
        };
        Refusal::new(id, format!("{disk}: {error}; {remedy}"))
    })
}

fn text(it: &Description) -> String {
    let mut lines = Vec::new();
    let mut say = |name: &str, value: String| lines.push(format!("{name:<16}{value}"));
    let newest = it.slots.iter().filter_map(|slot| slot.as_ref().ok()).max();
    for (number, slot) in it.slots.iter().enumerate() {
        let value = match slot {
            Ok(sequence) if Some(sequence) == newest => format!("sequence {sequence}, in force"),
            Ok(sequence) => format!("sequence {sequence}"),
            Err(error) => format!("not valid: {error}"),
        };
        say(&format!("slot {number}"), value);
    }
    let [cluster, mirror, node] = &it.names;
    say(
        "created as",
        format!("cluster {cluster}, mirror {mirror}, node {node}"),
    );
    say("mirror id", id(&it.mirror));
    say("replica id", id(&it.replica));
    say("peer's replica", id(&it.peer_replica));
    say(
        "data area",
        format!("{} ({} bytes)", human::size(it.data_size), it.data_size),
    );
    let mirrored = match it.mirror_size {
        0 => "not yet agreed".to_owned(),
        size => format!("{} ({size} bytes)", human::size(size)),
    };
    say("mirrored size", mirrored);
    say("trust", it.trust.clone());
    let flags: Vec<&str> = [
        (it.primary, "was Primary"),
        (it.used, "generation was written to"),
        (it.all_dirty, "every block counts as dirty"),
    ]
    .into_iter()
    .filter_map(|(set, text)| set.then_some(text))
    .collect();
    say(
        "flags",
        if flags.is_empty() {
            "none".to_owned()
        } else {
            flags.join(", ")
        },
    );
    say("generation", id(&it.generation));
    say("holders", it.holders.clone());
    if let Some(proposal) = &it.proposal {
        say("proposed", proposal.clone());
    }
    for (index, generation) in it.ancestry.iter().enumerate() {
        let unused = if index < usize::from(it.unused_ancestors) {
            ", unused"
        } else {
            ""
        };
        let name = if index == 0 { "ancestry" } else { "" };
        say(name, format!("{generation}{unused}"));
    }
    say("last common", id(&it.last_common));
    say("in sync in boot", id(&it.in_sync_boot));
    let active = match &it.active_extents {
        None => "no block verifies: every block counts as dirty".to_owned(),
        Some(extents) => {
            let reach = human::size(extents.len() as u64 * EXTENT);
            let named: Vec<String> = extents.iter().map(u32::to_string).collect();
            format!("{} extents ({reach}) {}", extents.len(), named.join(" "))
        }
    };
    say("activity log", active.trim_end().to_owned());
    say(
        "dirty",
        format!("{} ({} bytes)", human::size(it.dirty_bytes), it.dirty_bytes),
    );
    for (start, len) in &it.dirty_ranges {
        say("", format!("{} at byte {start}", human::size(*len)));
    }
    let shown: u64 = it.dirty_ranges.iter().map(|(_, len)| len).sum();
    if shown < it.dirty_bytes {
        say(
            "",
            format!("and {} more", human::size(it.dirty_bytes - shown)),
        );
    }
    if it.damaged_bitmap_blocks > 0 {
        let what = "bitmap blocks do not verify: what they cover counts as dirty";
        say("damaged", format!("{} {what}", it.damaged_bitmap_blocks));
    }
    lines.join("\n")
}

fn id(text: &str) -> String {
    // Ids and generations that were never assigned are all zero.
    if text.bytes().all(|byte| matches!(byte, b'0' | b':')) {
        "none".to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_in_words() {
        let description = Description {
            slots: vec![Ok(6), Err("checksum mismatch".to_owned())],
            mirror: "0".repeat(32),
            replica: "7".repeat(32),
            peer_replica: "0".repeat(32),
            names: ["c".to_owned(), "r0".to_owned(), "a".to_owned()],
            data_size: 1 << 30,
            mirror_size: 0,
            trust: "UpToDate".to_owned(),
            primary: true,
            used: false,
            all_dirty: true,
            generation: "2:0c".to_owned(),
            holders: "Sole".to_owned(),
            proposal: None,
            ancestry: vec!["1:0a".to_owned(), "0:0b".to_owned()],
            unused_ancestors: 1,
            last_common: "1:0a".to_owned(),
            in_sync_boot: "0".repeat(32),
            active_extents: Some(vec![3, 9]),
            dirty_bytes: 12288,
            dirty_ranges: vec![(4096, 8192)],
            damaged_bitmap_blocks: 0,
        };
        let text = text(&description);
        for line in [
            "slot 0          sequence 6, in force",
            "slot 1          not valid: checksum mismatch",
            "mirror id       none",
            "mirrored size   not yet agreed",
            "flags           was Primary, every block counts as dirty",
            "ancestry        1:0a, unused",
            "                0:0b",
            "activity log    2 extents (8 MiB) 3 9",
            "dirty           12 KiB (12288 bytes)",
            "                8 KiB at byte 4096",
            "                and 4 KiB more",
        ] {
            assert!(text.lines().any(|it| it == line), "{line}\n{text}");
        }
    }
}
