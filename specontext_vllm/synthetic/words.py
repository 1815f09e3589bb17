"""The ordinary English words of the made-up texts, by the place they take in a sentence.

KEYS and SUBJECTS share no word: a key (a person's or a town's name) is in a document only where a
task put it, so that "which one was asked for" has one answer.
"""

# Names of facts and passages: people and places, always written with a space before them.
KEYS = """
Adam Alan Albert Alice Allen Amber Amos Andrew Anna Anton Arnold Arthur Austin Barry Basil Bella
Benton Bernard Bianca Boris Brandon Brian Bruno Calvin Carl Carla Carmen Carol Carter Cecil Celia
Chester Clara Claude Clement Colin Conrad Cora Curtis Cyril Daisy Dalton Daniel Daphne Darwin David
Delia Dennis Diana Dominic Donna Doris Dorothy Douglas Duncan Edgar Edith Edmund Edward Elaine
Eleanor Elena Elliot Elmer Elsa Emily Emma Eric Ernest Esther Eugene Evan Fabian Felix Fiona Flora
Floyd Frances Frank Gail Gavin George Gerald Gilbert Gloria Gordon Grace Graham Greta Gustav Hannah
Harold Harris Harvey Hector Helen Henry Herbert Hilda Homer Horace Howard Hugo Ingrid Irene Iris
Isaac Ivan Jacob James Janet Jasper Jerome Joan Joel Johanna Jonas Joseph Joyce Judith Julia Julian
Karen Karl Keith Kenneth Kevin Lara Laura Laurel Leah Leon Leonard Leslie Lewis Linda Linus Lionel
Lloyd Logan Louis Lucas Lucy Luther Lydia Mabel Magnus Marcus Margot Maria Marlow Martha Martin
Mason Matilda Maurice Melvin Mercer Michael Mildred Milo Miriam Mona Morgan Morris Moses Nadia
Nancy Naomi Nathan Nelson Nina Noah Nora Norman Olga Oliver Oscar Otto Owen Pamela Patrick Paula
Pearl Percy Peter Philip Phoebe Quentin Rachel Ralph Ramona Raymond Rebecca Regina Rex Robert Robin
Roger Roland Roman Ronald Rosa Ruben Rufus Rupert Russell Ruth Samuel Sandra Sarah Selma Seth
Sheldon Sidney Silas Simon Sonia Sophie Spencer Stanley Stella Susan Sylvia Theodor Thomas Trevor
Tristan Ursula Vera Vernon Victor Vincent Viola Virgil Walter Wanda Warren Wesley Wilbur Wilfred
Willa Winston Xavier Yvonne Zelda
Athens Berlin Bristol Cairo Cardiff Denver Dover Dublin Florence Geneva Havana Houston Kyoto Lima
Lisbon London Madrid Milan Moscow Nairobi Oslo Oxford Paris Perth Prague Quebec Riga Rome Salem
Seoul Sofia Sparta Tokyo Toledo Tunis Turin Venice Vienna Warsaw York Zurich
Harbor Meadow River Forest Castle Bridge Garden Valley Island Tower
""".split()

# Who does things in ordinary sentences: plural, so that no article is needed, and always first.
SUBJECTS = """
Actors Artists Bakers Bankers Barbers Bishops Boxers Builders Butlers Captains Clerks Cooks Cousins
Dancers Dealers Doctors Drivers Dukes Editors Farmers Fishers Friends Gardeners Guards Guests
Hunters Judges Kings Knights Lawyers Leaders Masons Mayors Miners Monks Mothers Nurses Owners
Painters Pilots Pirates Poets Porters Princes Queens Rangers Readers Riders Rivals Sailors Scholars
Scouts Servants Singers Soldiers Students Tailors Teachers Tenants Thieves Traders Uncles Voters
Waiters Weavers Widows Winners Witnesses Workers Writers
""".split()

VERBS = """
admired asked avoided baked bent blamed blessed bought broke brought built burned buried carried
carved caught chased checked chose cleaned climbed closed copied counted covered crossed cut danced
defended divided doubted dragged drew dropped dug earned ended entered examined fed feared fetched
filled fixed followed forgot fought found framed gathered grew guarded guided hated held helped hid
hired hung hunted joined judged kept kicked kissed knew learned left lent lifted liked lit loaded
locked loved made measured melted mended missed mixed moved named noticed offered opened ordered
packed painted paid passed placed planned planted played praised pressed printed pulled pushed
raised ran refused rented repaired rescued returned robbed rolled sang saved searched shaped shared
shook signed sold sorted spared spent split spread started stole studied swept taught tested
thanked threw tied traced traded trained trusted turned used visited waited wanted warned washed
watched weighed wiped won wore wrapped
""".split()

ADJECTIVES = """
amber ancient angry bare bitter black blind blue bold brave brief bright broad broken brown busy
calm careful cheap clean clear clever cold common copper cruel curious damp dark dear deep dim
distant dry dull dusty eager early easy empty equal fair faint famous fancy fast fat final fine
firm flat foolish foreign fresh gentle giant glad golden grand grave gray great green happy hard
harsh heavy hidden hollow honest hot huge humble humid icy idle iron jolly keen kind large late
lazy light little local lonely long loose loud low lucky mad major mean mild minor modern muddy
narrow neat new noble noisy odd old open orange pale patient plain polite poor pretty proud purple
quick quiet rare raw ready red rich rigid ripe rough round royal rude rural rusty sacred sad safe
salty scarce secret sharp shiny short shy silent silver simple slim slow small smooth soft solid
sore sour spare square steep stiff still strange strict strong sturdy sudden sunny sweet swift tall
tame tender thick thin tidy tiny tired tough twin ugly upper vague vast violet warm weak wet white
whole wide wild windy wise wooden worn yellow young
""".split()

NOUNS = """
acorns anchors animals apples apricots arrows axes badges baskets barrels beans bears beds bees
bells belts berries birds blankets boats bones books boots bottles bowls boxes branches bricks
brooms brushes buckets bugs bulls buttons cabins cakes camels camps candles canoes caps cards
carpets carts caves chains chairs charts cherries chests churches circles clocks clouds coats coins
cows crabs cranes crops crowns crows cups curtains dams deer desks diamonds dishes dogs dolls
donkeys doors dragons drums ducks eagles eggs elms engines falcons fans farms feathers fences ferns
fields figs fires fish flags flames flowers flutes foxes frogs fruits gates geese gems ghosts gifts
glasses gloves goats grapes hammers harps hats hawks hearts hens herds herons hills hives hooks
horns horses hotels houses inns islands jars jewels kettles keys kites kittens knives knots ladders
lakes lambs lamps lanes lanterns leaves lemons letters lilies lions lizards locks logs looms maps
marbles markets meadows melons mice mills mirrors mules nails needles nests nets nuts oars oaks
olives onions orchards ovens owls oxen pages palaces palms papers parcels parks paths peaches pears
pebbles pencils pens pigeons pigs pillows pines pins pipes plates plums pockets ponds pots prizes
puppets rabbits rafts rings rivers roads robes rocks roofs rooms ropes roses rugs sails sandals
saws scarves seals seeds sheep shells shields ships shirts shoes shops shovels snails snakes
spiders spoons springs stables stairs stamps stars statues stones stools stories stoves streams
streets swans swords tables tents temples tigers toads tools torches towels towers towns toys
trains trays trees trunks tunnels turtles vases villages violins wagons walls wasps watches wells
whales wheels wings wolves woods yachts zebras
""".split()

LINKS = """
above across after against along among around before behind below beneath beside between beyond
despite during inside near outside past through toward under until upon within without
""".split()

ADVERBS = """
again alone badly boldly bravely briefly calmly daily easily gladly hardly kindly loudly nearly
nightly often openly proudly quickly quietly rarely sadly safely seldom slowly softly suddenly
today together twice weekly
""".split()

COUNTS = """
two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty ninety
many few several
""".split()
