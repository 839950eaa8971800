// The live parts of the pages. Every form and link works without any of this; it makes them immediate.

import { $, bindPage } from "./page.js";
import { bindBlind } from "./review/blind_test.js";
import { bindCharts } from "./review/charts.js";
import { Chat } from "./chat/room.js";
import { bindStart } from "./chat/start.js";
import { bindKeys, bindLimits } from "./chat/composer.js";
import { bindLoads } from "./models/loading.js";
import { bindSetup } from "./steering/options_form.js";
import { bindUploads } from "./uploads.js";
import { Workbench } from "./steering/workbench.js";

bindPage();
bindLimits();
bindLoads();
bindUploads();
bindSetup();
bindBlind();
bindCharts();
const workbench = $("[data-session]");
if (workbench) new Workbench(workbench);
const room = $("[data-room]");
if (room) new Chat(room);
const beginning = $("[data-chat-start]");
if (beginning) bindStart(beginning);
bindKeys();
