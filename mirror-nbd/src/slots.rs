//! A table whose entries keep their number until they are removed: no hashing, and no allocation
//! once it has grown to what is in flight at most.

/// Entries by number.
pub struct Slots<T> {
    entries: Vec<Option<T>>,
    vacant: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Slots<T> {
        Slots {
            entries: Vec::new(),
            vacant: Vec::new(),
        }
    }
}

impl<T> Slots<T> {
    /// Adds an entry; the number is free for reuse after [`Slots::remove`].
    pub fn insert(&mut self, entry: T) -> u32 {
        match self.vacant.pop() {
            Some(slot) => {
                self.entries[slot as usize] = Some(entry);
                slot
            }
            None => {
                self.entries.push(Some(entry));
                (self.entries.len() - 1) as u32
            }
        }
    }

    /// Adds the entry that `make` builds around its own number.
    pub fn insert_with(&mut self, make: impl FnOnce(u32) -> T) -> u32 {
        let slot = match self.vacant.last() {
            Some(slot) => *slot,
            None => self.entries.len() as u32,
        };
        let inserted = self.insert(make(slot));
        debug_assert_eq!(slot, inserted);
        slot
    }

    /// An entry.
    pub fn get(&self, slot: u32) -> Option<&T> {
        self.entries.get(slot as usize)?.as_ref()
    }

    /// An entry, to be changed.
    pub fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.entries.get_mut(slot as usize)?.as_mut()
    }

    /// Takes an entry out for good.
    pub fn remove(&mut self, slot: u32) -> Option<T> {
        let entry = self.take(slot)?;
        self.vacant.push(slot);
        Some(entry)
    }

    /// Takes an entry out for a moment; its number stays taken.
    pub fn take(&mut self, slot: u32) -> Option<T> {
        self.entries.get_mut(slot as usize)?.take()
    }

    /// Ends [`Slots::take`].
    pub fn put_back(&mut self, slot: u32, entry: T) {
        self.entries[slot as usize] = Some(entry);
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len() - self.vacant.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All entries with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let numbered = self.entries.iter().enumerate();
        numbered.filter_map(|(slot, entry)| Some((slot as u32, entry.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_reused_only_after_removal() {
        let mut slots = Slots::default();
        let a = slots.insert('a');
        let b = slots.insert_with(|slot| char::from(b'0' + slot as u8));
        assert_eq!(slots.get(b), Some(&'1'));
        let taken = slots.take(a).expect("there");
        assert_ne!(slots.insert('c'), a);
        slots.put_back(a, taken);
        assert_eq!(slots.remove(a), Some('a'));
        assert_eq!(slots.insert('d'), a);
        assert_eq!(slots.len(), 3);
    }
}
